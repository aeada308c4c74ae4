"""Recipes: what a run's metrics were made with, but for the seed of its training. Runs of one recipe are replicates."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import sha256_json
from sdtrain.tools.compare.runs import Run

_METRICS_OUT = "metrics/evaluate.json"
SEED = "train.seed"
CODE = ("src/", "stages/")
"""Folders of the inputs that are code; all others are data."""
_ABSENT = object()
_MAX_NAME_CHARS = 100


@dataclass(frozen=True)
class Origin:
    """All that a run's metrics follow from, except the training's seed; the same of all runs of a recipe."""

    params: dict[str, Any]
    """Values by dotted key."""
    inputs: dict[str, str]
    """Hashes of code and data by path."""
    causes: dict[str, frozenset[str]]
    """Of those inputs that stages made: keys and paths of what they were made from."""


@dataclass
class Recipe:
    """Runs that differ in nothing but the training's seed."""

    name: str
    """What tells it from the recipes that it was grouped with."""
    origin: Origin
    runs: dict[int | None, Run]
    """One for each seed, in their order."""
    repeats: list[Run] = field(default_factory=list)
    """Runs of a seed that is already there. They don't count."""


def group_runs(runs: list[Run]) -> tuple[list[Recipe], list[str]]:
    """The recipes of these runs; and notes on runs that repeat another, whose params were changed since, or that are
    left out because their metrics don't belong to what their dvc.lock records.
    """
    recipes: list[Recipe] = []
    notes = []
    for run in runs:
        try:
            origin, seed = origin_of(run)
        except InputError as fault:
            notes.append(f"left out: {fault}")
            continue
        notes += _changed_since(run, origin.params | {SEED: seed})
        recipe = next((found for found in recipes if found.origin == origin), None)
        if recipe is None:
            recipe = Recipe("", origin, {})
            recipes.append(recipe)
        first = recipe.runs.setdefault(seed, run)
        if first is not run:
            recipe.repeats.append(run)
            how = "with the same metrics" if first.numbers == run.numbers else "with other metrics"
            notes.append(f"{run.name} repeats {first.name}, the same recipe and seed, {how}; only {first.name} counts")
    for recipe in recipes:
        recipe.runs = dict(sorted(recipe.runs.items(), key=lambda item: (item[0] is None, item[0])))
    for recipe, name in zip(recipes, _names(recipes), strict=True):
        recipe.name = name
    return recipes, notes


def origin_of(run: Run) -> tuple[Origin, int | None]:
    """What a run's metrics were made with, by its dvc.lock; and the training's seed.

    Only the stage that wrote the metrics and those before it count: no param of `sample` changes a metric. Runs older
    than `train.seed` were trained with the seed of everything, `seed`.

    Raises:
        InputError: dvc.lock has no such stage, or its stages don't follow from each other, as after a pipeline that
            was stopped half-way.
    """
    stages = run.lock.get("stages") or {}
    makers = {out["path"]: name for name, stage in stages.items() for out in stage.get("outs", [])}
    made = {out["path"]: _hash(out) for stage in stages.values() for out in stage.get("outs", [])}
    if _METRICS_OUT not in makers:
        raise InputError(f"{run.name}: no stage in dvc.lock has the out {_METRICS_OUT}; run `dvc repro`")
    params: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    read: dict[str, frozenset[str]] = {}
    seeded: set[str] = set()
    for stage in _up_to(makers[_METRICS_OUT], stages, makers):
        own = {key: value for tree in stages[stage].get("params", {}).values() for key, value in leaves(tree)}
        deps = {dep["path"]: _hash(dep) for dep in stages[stage].get("deps", [])}
        stale = [key for key, value in own.items() if params.get(key, value) != value]
        stale += [path for path, digest in deps.items() if made.get(path, digest) != digest]
        if stale:
            raise InputError(
                f"{run.name}: by dvc.lock not all stages ran on the same {stale[0]}, so the metrics belong to no one "
                "state of the project; run `dvc repro`"
            )
        unseeded = {path: digest for path, digest in deps.items() if makers.get(path) not in seeded}
        # The whole section: a run older than `train.seed` depends on its seed just the same.
        if len(unseeded) < len(deps) or any(key.startswith("train.") for key in own):
            seeded.add(stage)
        params |= own
        inputs |= unseeded
        read[stage] = frozenset(own.keys() | unseeded.keys())
    seed = params.pop(SEED, params.get("seed"))
    return Origin(params, inputs, {path: read[makers[path]] for path in inputs if path in makers}), seed


def _up_to(last: str, stages: dict[str, Any], makers: dict[str, str]) -> list[str]:
    """A stage, after those that it depends on."""
    order: list[str] = []

    def visit(stage: str) -> None:
        for dep in stages[stage].get("deps", []):
            maker = makers.get(dep["path"])
            if maker is not None and maker not in order:
                visit(maker)
        order.append(stage)

    visit(last)
    return order


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """By dotted key; an empty mapping is a leaf."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _hash(entry: dict[str, Any]) -> str:
    return str(entry.get(entry.get("hash", "md5")))


def _changed_since(run: Run, used: dict[str, Any]) -> list[str]:
    """A note if params.yaml has another value than the metrics were made with."""
    written = dict(leaves(run.params))
    changed = [key for key, value in used.items() if key in written and written[key] != value]
    return [
        f"{run.name}: params.yaml has {key} = {written[key]!r}, but the metrics were made with {used[key]!r} and count "
        "as that; run `dvc repro`"
        for key in changed[:1]
    ]


def varying(origins: list[Origin]) -> list[str]:
    """Keys and paths that differ, without what was made from others that do."""
    facts = [origin.params | origin.inputs for origin in origins]
    names = list(dict.fromkeys(name for found in facts for name in found))
    differing = {n for n in names if any(found.get(n, _ABSENT) != facts[0].get(n, _ABSENT) for found in facts)}
    causes = {name: set().union(*(origin.causes.get(name, ()) for origin in origins)) for name in names}
    return [name for name in names if name in differing and not causes[name] & differing]


def _names(recipes: list[Recipe]) -> list[str]:
    """What differs between them, `train.lr 0.0001, data/set 1a2b3c`; their first runs' names if that is too much."""
    differing = varying([recipe.origin for recipe in recipes])
    code = [name for name in differing if name.startswith(CODE)]
    code = [name for name in code if not any(name.startswith(f"{folder}/") for folder in code)]
    others = [name for name in differing if not name.startswith(CODE)]
    names = []
    for recipe in recipes:
        facts = [_in_words(name, recipe.origin) for name in others]
        if len(code) == 1:
            facts.append(f"code {_in_words(code[0], recipe.origin)}")
        elif code:
            facts.append(f"code {sha256_json([recipe.origin.inputs.get(name) for name in code])[:6]}")
        names.append(", ".join(facts) or "the recipe")
    if len(set(names)) < len(names) or any(len(name) > _MAX_NAME_CHARS for name in names):
        return [f"as {next(iter(recipe.runs.values())).name}" for recipe in recipes]
    return names


def _in_words(name: str, origin: Origin) -> str:
    if name in origin.inputs:
        return f"{name} {origin.inputs[name][:6]}"
    if name not in origin.params:
        return f"no {name}"
    value = origin.params[name]
    return f"{name} {value if isinstance(value, str) else json.dumps(value)}"

"""Verdicts on recipes: which is better by a metric, over training seeds and images.

A recipe is what a run's metrics were made with, but for `train.seed`. Two checkpoints always differ; whether their
recipes do, only several seeds of each can tell.
"""

import difflib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from sdtrain.evaluation.set_metrics import MIN_VERDICT_IMAGES
from sdtrain.ground import randomness
from sdtrain.ground.errors import InputError
from sdtrain.ground.metric_names import (
    IMAGE_SET,
    Direction,
    better_direction,
    counted_by,
    is_by_encoder,
    is_of_sets,
)
from sdtrain.ground.statistics import (
    Difference,
    bootstrap_interval,
    holm,
    recipe_difference,
    t_interval,
    welch_difference,
)
from sdtrain.tools.compare.faults import faults_of
from sdtrain.tools.compare.recipes import Recipe, group_runs
from sdtrain.tools.compare.runs import Run, read_experiments

if TYPE_CHECKING:
    import pandas as pd

Word = Literal["better", "worse", "can't tell", "no verdict"]
Reason = Literal["one seed", "other images", "few images", "not finite"]

LEVEL = 0.05
"""A recipe is better or worse where the p-value, adjusted for the number of comparisons, is smaller."""
_NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Verdict:
    """On a recipe, held against the reference."""

    word: Word
    reason: Reason | None = None
    """Why there is no verdict."""
    difference: Difference | None = None
    """This recipe minus the reference."""
    p_adjusted: float | None = None
    over_images: bool = False
    """Whether images count as drawn anew, too; else these are fixed, and only seeds are."""


@dataclass(frozen=True)
class Ranked:
    """A recipe by one metric."""

    recipe: Recipe
    values: np.ndarray
    """[seeds], in the order of the recipe's runs."""
    verdict: Verdict | None
    """None of the reference itself."""

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def sd(self) -> float | None:
        """Over seeds; None of one."""
        return float(self.values.std(ddof=1)) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, of the mean over seeds; None of one."""
        return t_interval(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class CheckpointDifference:
    """Of two trained models on the same images. It says nothing about their recipes."""

    mean: float
    """The first-ranked minus the other."""
    ci_low: float
    ci_high: float
    num_images: int


@dataclass(frozen=True)
class Comparison:
    """Recipes, ranked by one metric, each held against one of them, the reference."""

    metric: str
    better: Direction
    ranked: list[Ranked]
    """Best first."""
    reference: Ranked
    reference_of: str | None
    """A run of the reference, for which it was chosen; None where it was chosen because it ranks first."""
    num_comparisons: int
    """That p-values are adjusted for."""
    checkpoints: CheckpointDifference | None
    """If there are just two runs, of two recipes."""
    notes: list[str]
    faults: dict[str, list[str]]
    """What is wrong with runs, by their names."""
    num_images: int | None
    """Whose mean the metric is, or that make up the set that it is about; None if that is unknown or not the same."""
    yardstick: np.ndarray | None = None
    """The metric of HEAD's recipe by seed [seeds], where no recipe that is ranked has several; None without any."""

    @property
    def is_best(self) -> bool:
        """Whether the reference was chosen because it ranks first; then p-values are adjusted for all pairs."""
        return self.reference_of is None


@dataclass(frozen=True)
class Measured:
    """A metric of one recipe."""

    by_seed: np.ndarray
    """[seeds]."""
    by_item: np.ndarray
    """[seeds, items]; no items if the metric has no single values."""
    asked: tuple | None
    """Item, text and timestep of each single value, and of what an image encoder says a number that stands for it and
    its images; None if that isn't the same in all runs."""
    num_images: int | None = None
    """N; None if it is unknown or not the same in all runs."""
    is_of_few: bool = False
    """Whether it is about sets of images too small for a verdict."""


def compare(runs: list[Run], metric: str, baseline: str | None = None) -> Comparison:
    """Rank the recipes of these runs.

    Each is held against the reference: the recipe of the run `baseline`; else that of HEAD, if it is there with two
    seeds or more; else the best one that has two seeds or more. P-values are adjusted by Holm's method. Where the
    reference is chosen because it is the best, they are adjusted for all pairs of recipes, since any might have become
    it: with 10 equal recipes of 5 seeds, 2 % of simulated comparisons then find a difference; adjusted for the pairs
    with the best alone, 8 % do.

    Raises:
        InputError: no run has the metric, or it isn't one to rank by; `baseline` isn't among the runs that have it; no
            run can be compared; or a run's table is broken.
    """
    better = _direction(metric, runs)
    notes = [f"left out: {run.name} has no {metric}" for run in runs if metric not in run.numbers]
    recipes, more_notes = group_runs([run for run in runs if metric in run.numbers])
    notes += more_notes
    if not recipes:
        raise InputError("\n".join(["no run can be compared", *notes]))
    sign = 1 if better == "higher" else -1
    recipes.sort(key=lambda recipe: _rank(sign * _by_seed(recipe, metric).mean()))
    measured = [measure(recipe, metric) for recipe in recipes]
    reference, is_best = _reference(recipes, baseline)
    pairs = {
        (place, other): held_against(measured[place], measured[other])
        for place, other in itertools.permutations(range(len(recipes)), 2)
        if other == reference or (is_best and place < other and place != reference)
    }
    verdicts = dict(zip(pairs, _adjust(list(pairs.values()), sign), strict=True))
    ranked = [
        Ranked(recipe, measured[place].by_seed, verdicts.get((place, reference)))
        for place, recipe in enumerate(recipes)
    ]
    return Comparison(
        metric,
        better,
        ranked,
        ranked[reference],
        reference_of=None if is_best else baseline or "HEAD",
        num_comparisons=sum(verdict.difference is not None for verdict in pairs.values()),
        checkpoints=_checkpoints(measured),
        notes=notes,
        faults={run.name: found for run in runs if (found := faults_of(run))},
        num_images=_same(found.num_images for found in measured),
    )


def with_yardstick(comparison: Comparison, root: Path) -> Comparison:
    """The same, with what HEAD and its experiments tell of the seeds' spread, if what was compared tells nothing of it.

    Args:
        root: the project's.

    Raises:
        InputError: a run's table is broken.
    """
    if len(comparison.ranked) < 2 or any(len(ranked.values) > 1 for ranked in comparison.ranked):
        return comparison
    runs = [run for run in read_experiments(root)[0] if comparison.metric in run.numbers]
    for recipe in group_runs(runs)[0]:
        if len(recipe.runs) > 1 and any(run.is_head for run in (*recipe.runs.values(), *recipe.repeats)):
            return replace(comparison, yardstick=_by_seed(recipe, comparison.metric))
    return comparison


def measure(recipe: Recipe, metric: str) -> Measured:
    """A metric that all of the recipe's runs have; what single values there are, by seed and item."""
    tables = [_single_values(run, metric) for run in recipe.runs.values()]
    judges = [run.numbers.get(IMAGE_SET, run.name) if is_by_encoder(metric) else None for run in recipe.runs.values()]
    asked = {(judge, *table.index) for judge, table in zip(judges, tables, strict=True)}
    is_of_few = is_of_sets(metric) and any(
        run.numbers.get("num_drawn_images", 0) < MIN_VERDICT_IMAGES for run in recipe.runs.values()
    )
    if len(asked) > 1:
        return Measured(_by_seed(recipe, metric), np.empty((len(tables), 0)), None, is_of_few=is_of_few)
    by_item = np.array([table.groupby(level=["item", "text"]).mean() for table in tables], dtype=np.float64)
    count = counted_by(metric.removesuffix("_trained"))
    num_images = by_item.shape[1] or _same(run.numbers.get(count) for run in recipe.runs.values())
    return Measured(_by_seed(recipe, metric), by_item, asked.pop(), num_images, is_of_few)


def held_against(a: Measured, b: Measured) -> Verdict:
    """A minus B, of which the word and the adjusted p-value aren't known yet."""
    if a.asked is None or a.asked != b.asked:  # first, as more seeds wouldn't help
        return Verdict("no verdict", "other images")
    if a.is_of_few or b.is_of_few:
        return Verdict("no verdict", "few images")
    if min(len(a.by_seed), len(b.by_seed)) < 2:
        return Verdict("no verdict", "one seed")
    if not (np.isfinite(a.by_seed).all() and np.isfinite(b.by_seed).all()):
        return Verdict("no verdict", "not finite")
    if a.by_item.shape[1] < 2:
        return Verdict("can't tell", difference=welch_difference(a.by_seed, b.by_seed))
    return Verdict("can't tell", difference=recipe_difference(a.by_item, b.by_item), over_images=True)


def _direction(metric: str, runs: list[Run]) -> Direction:
    better = better_direction(metric)
    if better is None or not any(metric in run.numbers for run in runs):
        there = sorted({name for run in runs for name in run.numbers if better_direction(name)})
        near = difflib.get_close_matches(metric, there, n=1)
        hint = f"; nearest is {near[0]}" if near else ""
        raise InputError(
            f"metric = {metric!r}: must be one that tells which run is better, and that a run has: "
            f"{', '.join(there) or 'there is none'}{hint}"
        )
    return better


def _rank(goodness: float) -> float:
    """Ascending, best first; a run that diverged comes last."""
    return -goodness if math.isfinite(goodness) else math.inf


def _reference(recipes: list[Recipe], baseline: str | None) -> tuple[int, bool]:
    """The place of the reference among the ranked recipes, and whether it was chosen for its rank."""
    members = [[*recipe.runs.values(), *recipe.repeats] for recipe in recipes]
    if baseline is not None:
        for place, found in enumerate(members):
            if any(run.name == baseline for run in found):
                return place, False
        names = ", ".join(run.name for found in members for run in found)
        raise InputError(f"baseline = {baseline!r}: must be one of the runs that have the metric: {names}")
    of_head = [place for place, found in enumerate(members) if any(run.is_head for run in found)]
    replicated = [place for place, recipe in enumerate(recipes) if len(recipe.runs) > 1]
    if of_head and (of_head[0] in replicated or not replicated):
        return of_head[0], False
    return (replicated or [0])[0], True


def _same(found: Iterable[float | None]) -> int | None:
    """What all are; None if they differ."""
    kinds = set(found)
    number = kinds.pop()
    return None if kinds or number is None else int(number)


def _by_seed(recipe: Recipe, metric: str) -> np.ndarray:
    return np.array([run.numbers[metric] for run in recipe.runs.values()], dtype=np.float64)


def _single_values(run: Run, metric: str) -> "pd.Series":
    """By item, text and timestep, in their order; none if the run has no table, or the metric isn't a mean."""
    import pandas as pd

    keys = ["item", "text", "timestep"]
    if run.values is None:
        return pd.Series(dtype="float64", index=pd.MultiIndex.from_arrays([[]] * len(keys), names=keys))
    rows = run.values[run.values["metric"] + "_" + run.values["model"] == metric]
    return rows.fillna({"timestep": -1}).groupby(keys)["value"].mean()


def _adjust(verdicts: list[Verdict], sign: int) -> list[Verdict]:
    """With adjusted p-values and the words that follow; `sign` is that of a better difference."""
    adjusted = iter(holm([verdict.difference.p for verdict in verdicts if verdict.difference]))
    found = []
    for verdict in verdicts:
        if verdict.difference:
            p = next(adjusted)
            word = "can't tell" if p >= LEVEL else "better" if sign * verdict.difference.mean > 0 else "worse"
            verdict = replace(verdict, word=word, p_adjusted=p)
        found.append(verdict)
    return found


def _checkpoints(measured: list[Measured]) -> CheckpointDifference | None:
    if [len(found.by_seed) for found in measured] != [1, 1] or measured[0].asked != measured[1].asked:
        return None
    differences = (measured[0].by_item - measured[1].by_item)[0]
    if len(differences) < 2:
        return None
    low, high = bootstrap_interval(differences, _NUM_RESAMPLES, randomness.generator(0, "checkpoints bootstrap"))
    return CheckpointDifference(float(differences.mean()), low, high, len(differences))

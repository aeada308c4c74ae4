"""A comparison in words: as a table, as sentences, as JSON."""

import math
from typing import Any

from sdtrain.evaluation.set_metrics import MIN_VERDICT_IMAGES
from sdtrain.tools.compare import Comparison, Ranked, Verdict

HEADER = ("recipe", "seeds", "mean", "95 % over seeds", "sd", "difference", "95 %", "p", "verdict")
_FAULTS = {
    "other images": "have no values of the same images",
    "few images": f"were measured on too few images, fewer than {MIN_VERDICT_IMAGES} (evaluate.num_prompts)",
    "not finite": "don't have finite values alone",
}
"""Of two recipes, by the reason that a verdict gives."""


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The table's rows, best first, in the columns of `HEADER`; differences are this recipe minus the reference."""
    return [
        (
            ranked.recipe.name,
            str(len(ranked.values)),
            f"{ranked.mean:.4g}",
            "" if ranked.interval is None else _interval(*ranked.interval),
            "" if ranked.sd is None else f"{ranked.sd:.2g}",
            *_verdict_cells(ranked.verdict),
        )
        for ranked in comparison.ranked
    ]


def sentences(comparison: Comparison) -> list[str]:
    """What follows, a sentence each, then what to know about the numbers."""
    reference = comparison.reference
    others = [ranked for ranked in comparison.ranked if ranked is not reference]
    by_word: dict[str, list[Ranked]] = {}
    for ranked in others:
        by_word.setdefault(ranked.verdict.reason or ranked.verdict.word, []).append(ranked)
    found = [
        f"{better.recipe.name} is better than {worse.recipe.name} ({_measured(ranked, comparison)})."
        for ranked in others
        if ranked.verdict.word in ("better", "worse")
        for better, worse in [(ranked, reference) if ranked.verdict.word == "better" else (reference, ranked)]
    ]
    alike = by_word.get("can't tell", [])
    if len(alike) > 1 and comparison.is_best:
        names = "; ".join(ranked.recipe.name for ranked in alike)
        best = "The best" if reference is comparison.ranked[0] else "The best with several seeds"
        found.insert(0, f"{best}, {reference.recipe.name}, can't be told from {len(alike)} others: {names}.")
    else:
        found += [
            f"{ranked.recipe.name} can't be told from {reference.recipe.name} ({_measured(ranked, comparison)})."
            for ranked in alike
        ]
    if "one seed" in by_word:
        found.append(_one_seed(comparison))
    for reason, fault in _FAULTS.items():
        for ranked in by_word.get(reason, []):
            found.append(f"{ranked.recipe.name} and {reference.recipe.name} {fault}: no verdict.")
    if not others:
        found.append("There is one recipe, and nothing to compare it with.")
    return found + _remarks(comparison, others)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON can hold it; numbers that aren't finite become null.

    - `metric`, `better`: its name, and `lower` or `higher`.
    - `reference`, `reference_is_best`: the recipe that others are held against, and whether it was chosen for its rank.
    - `num_images`: whose mean the metric is, or that make up its set; null if that is unknown or not the same.
    - `yardstick`: the metric of HEAD's recipe by seed, where no recipe that is ranked has several; else null.
    - `num_comparisons`: that p-values are adjusted for.
    - `recipes`, best first: `name`; `runs` (`name`, `seed`, `value`) and `repeats`, names of runs that don't count;
      `params` by dotted key and `inputs`, hashes by path; over seeds `mean`, and `ci_low`, `ci_high`, `sd`, null of one
      seed; `verdict`, null of the reference: `word`, `reason` if it is "no verdict", `over_images`, whether it is about
      other images, too, and `difference` (this recipe minus the reference), `ci_low`, `ci_high`, `df`, `p`,
      `p_adjusted`, null without a verdict.
    - `checkpoints`: of just two runs `difference` (the first-ranked minus the other), `ci_low`, `ci_high`,
      `num_images`; else null.
    - `sentences`, `notes`; and `faults`, what is wrong with runs, sentences by the run's name.
    """
    tree = {
        "metric": comparison.metric,
        "better": comparison.better,
        "reference": comparison.reference.recipe.name,
        "reference_is_best": comparison.is_best,
        "num_images": comparison.num_images,
        "yardstick": None if comparison.yardstick is None else comparison.yardstick.tolist(),
        "num_comparisons": comparison.num_comparisons,
        "recipes": [_recipe_tree(ranked) for ranked in comparison.ranked],
        "checkpoints": None,
        "sentences": sentences(comparison),
        "notes": comparison.notes,
        "faults": comparison.faults,
    }
    if found := comparison.checkpoints:
        bounds = {"ci_low": found.ci_low, "ci_high": found.ci_high}
        tree["checkpoints"] = {"difference": found.mean, **bounds, "num_images": found.num_images}
    return finite(tree)


def _verdict_cells(verdict: Verdict | None) -> tuple[str, str, str, str]:
    if verdict is None:
        return "", "", "", "(reference)"
    found = verdict.difference
    if found is None:
        return "", "", "", f"{verdict.reason}: no verdict"
    return f"{found.mean:+.2g}", _interval(found.ci_low, found.ci_high, "+"), _p(verdict.p_adjusted), verdict.word


def _measured(ranked: Ranked, comparison: Comparison) -> str:
    """Both sides of a verdict: `difference -0.0012, 95 % -0.0018 to -0.0006, p 0.002; 5 and 5 seeds`."""
    found, flip = ranked.verdict.difference, ranked.verdict.word == "worse"
    numbers = found.mean, found.ci_low, found.ci_high
    mean, low, high = (-found.mean, -found.ci_high, -found.ci_low) if flip else numbers
    sides = (comparison.reference, ranked) if flip else (ranked, comparison.reference)
    seeds = " and ".join(str(len(side.values)) for side in sides)
    p = _p(ranked.verdict.p_adjusted)
    return f"difference {mean:+.2g}, 95 % {_interval(low, high, '+')}, p {p}; {seeds} seeds"


def _one_seed(comparison: Comparison) -> str:
    single = [ranked.recipe.name for ranked in comparison.ranked if len(ranked.values) == 1]
    have = "has one seed: no verdict on the recipe" if len(single) == 1 else "have one seed: no verdict on the recipes"
    most = max(comparison.ranked, key=lambda ranked: len(ranked.values))
    yardstick = ""
    if most.sd is not None:
        yardstick = f"; as a yardstick, the {len(most.values)} seeds of {most.recipe.name} have an sd of {most.sd:.2g}"
    elif (values := comparison.yardstick) is not None:
        yardstick = f"; as a yardstick, the {len(values)} seeds of HEAD's recipe have an sd of {values.std(ddof=1):.2g}"
    return f"{'; '.join(single)} {have}{yardstick}. Run several values of train.seed."


def _remarks(comparison: Comparison, others: list[Ranked]) -> list[str]:
    found = []
    if pair := comparison.checkpoints:
        first, second = (next(iter(ranked.recipe.runs.values())).name for ranked in comparison.ranked)
        found.append(
            f"These two checkpoints, {first} minus {second}: {pair.mean:+.2g}, 95 % over {pair.num_images} images "
            f"{_interval(pair.ci_low, pair.ci_high, '+')}. Other seeds of the same recipes differ as well."
        )
    if any(ranked.verdict.difference and not ranked.verdict.over_images for ranked in others):
        found.append("This metric has no values by image: verdicts are about other seeds, on these same images.")
    if comparison.num_comparisons > 1:
        which = "of all pairs of recipes" if comparison.is_best else "with the reference"
        found.append(f"p is adjusted for {comparison.num_comparisons} comparisons, {which}; intervals aren't.")
    return found


def _recipe_tree(ranked: Ranked) -> dict[str, Any]:
    low, high = ranked.interval or (None, None)
    runs = zip(ranked.recipe.runs.items(), ranked.values, strict=True)
    return {
        "name": ranked.recipe.name,
        "runs": [{"name": run.name, "seed": seed, "value": float(value)} for (seed, run), value in runs],
        "repeats": [run.name for run in ranked.recipe.repeats],
        "params": ranked.recipe.origin.params,
        "inputs": ranked.recipe.origin.inputs,
        "mean": ranked.mean,
        "ci_low": low,
        "ci_high": high,
        "sd": ranked.sd,
        "verdict": None if ranked.verdict is None else _verdict_tree(ranked.verdict),
    }


def _verdict_tree(verdict: Verdict) -> dict[str, Any]:
    found = verdict.difference
    numbers = {"mean": None, "ci_low": None, "ci_high": None, "df": None, "p": None} if found is None else vars(found)
    return {
        "word": verdict.word,
        "reason": verdict.reason,
        "over_images": verdict.over_images,
        "difference": numbers["mean"],
        **{name: numbers[name] for name in ("ci_low", "ci_high", "df", "p")},
        "p_adjusted": verdict.p_adjusted,
    }


def finite(tree: Any) -> Any:
    """The tree with null for NaN and infinity, which JSON doesn't have."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _interval(low: float, high: float, sign: str = "") -> str:
    digits = "2" if sign else "4"
    return f"{low:{sign}.{digits}g} to {high:{sign}.{digits}g}"


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"

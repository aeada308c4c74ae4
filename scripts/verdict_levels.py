"""How often verdicts are wrong, and how often they are found, on trainings that were really run: a Markdown table.

    sdtrain sweep train.lr=1e-3,2e-3 train.seed=0..9
    python scripts/verdict_levels.py lr-0.001-seed-0 lr-0.001-seed-1 ...

Of the recipe with the most seeds, 10 or more, twice 5 are drawn that have none in common: the share that is then
called different is the level, which should be at most 5 %. From each other recipe that has 5 seeds or more, 5 are drawn
against 5 of it: the share that is told apart is the power. Beside both stands what is easily taken for a verdict on
recipes: a 95 % interval over images, paired, between two single trainings.
"""

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from sdtrain.ground.errors import InputError  # noqa: E402
from sdtrain.ground.randomness import generator  # noqa: E402
from sdtrain.ground.statistics import bootstrap_interval  # noqa: E402
from sdtrain.tools.compare import LEVEL, Measured, held_against, measure  # noqa: E402
from sdtrain.tools.compare.recipes import group_runs  # noqa: E402
from sdtrain.tools.compare.runs import Run, read_run  # noqa: E402

NUM_TRIALS = 200
NUM_SEEDS = 5
NUM_RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revs", nargs="+", metavar="EXPERIMENT")
    parser.add_argument("--metric", default="held_out_loss_trained", help="one with single values (%(default)s)")
    options = parser.parse_args()
    try:
        print(levels([read_run(Path(), rev) for rev in dict.fromkeys(options.revs)], options.metric))
    except InputError as error:
        sys.exit(f"error: {error}")


def levels(runs: list[Run], metric: str) -> str:
    """The table: level of the recipe with the most seeds, then its power against each other.

    Raises:
        InputError: a run hasn't got the metric, its single values are missing or of other images, or there are too few
            seeds.
    """
    for run in runs:
        if metric not in run.numbers:
            raise InputError(f"{run.name} has no {metric}")
    recipes, _ = group_runs(runs)
    recipes.sort(key=lambda recipe: len(recipe.runs), reverse=True)
    measured = [measure(recipe, metric) for recipe in recipes]
    num_seeds = len(measured[0].by_seed)
    if num_seeds < 2 * NUM_SEEDS:
        raise InputError(f"{recipes[0].name} has {num_seeds} seeds, and no recipe has more; {2 * NUM_SEEDS} are needed")
    for recipe, found in zip(recipes, measured, strict=True):
        if not found.by_item.size or found.asked != measured[0].asked:
            raise InputError(f"{recipe.name} and {recipes[0].name} have no values of the same images; compare others")
    lines = [
        f"| {metric} | seeds | difference | recipes called different, {NUM_SEEDS} and {NUM_SEEDS} seeds | "
        "checkpoints called different, paired over images, 1 and 1 seed |",
        "|---|---|---|---|---|",
    ]
    for recipe, found in zip(recipes, measured, strict=True):
        if len(found.by_seed) >= NUM_SEEDS:
            lines.append(_line(recipe.name, found, measured[0]))
    return "\n".join(lines)


def _line(name: str, a: Measured, b: Measured) -> str:
    """Of recipe A against B, which may be A itself."""
    rng, is_same = generator(0, "verdict levels"), a is b
    num_different = 0
    for _ in range(NUM_TRIALS):
        first = rng.permutation(len(a.by_seed))
        second = first[NUM_SEEDS:] if is_same else rng.permutation(len(b.by_seed))
        verdict = held_against(_of_seeds(a, first[:NUM_SEEDS]), _of_seeds(b, second[:NUM_SEEDS]))
        num_different += verdict.difference is not None and verdict.difference.p < LEVEL
    pairs = itertools.combinations(a.by_item, 2) if is_same else itertools.product(a.by_item, b.by_item)
    intervals = [bootstrap_interval(first - second, NUM_RESAMPLES, rng) for first, second in pairs]
    share = np.mean([not low <= 0 <= high for low, high in intervals])
    difference = "the same recipe" if is_same else f"{a.by_seed.mean() - b.by_seed.mean():+.2g}"
    return f"| {name} | {len(a.by_seed)} | {difference} | {num_different / NUM_TRIALS:.1%} | {share:.1%} |"


def _of_seeds(found: Measured, places: np.ndarray) -> Measured:
    return replace(found, by_seed=found.by_seed[places], by_item=found.by_item[places])


if __name__ == "__main__":
    main()

"""Means, their differences and verdicts on them, as arithmetic on arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """One mean minus another: of two recipes over training seeds, or of two samples."""

    mean: float
    ci_low: float
    ci_high: float
    """Of the 95 % interval, of this difference alone: not adjusted for others."""
    p: float
    """Two-sided, of there being no difference."""
    df: float
    """Degrees of freedom of its t distribution, by Welch and Satterthwaite."""


def bootstrap_interval(values: np.ndarray, num_resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` [N] (Efron 1979)."""
    picks = rng.integers(0, len(values), (num_resamples, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(num_right: int, num: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z, share = 1.959964, num_right / num
    center = share + z**2 / (2 * num)
    half = z * (share * (1 - share) / num + z**2 / (4 * num**2)) ** 0.5
    scale = 1 + z**2 / num
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of `values` [N ≥ 2], by Student's t with N − 1 degrees of freedom."""
    difference = _difference(float(np.mean(values)), [(np.var(values, ddof=1) / len(values), len(values) - 1)])
    return difference.ci_low, difference.ci_high


def welch_difference(a: np.ndarray, b: np.ndarray) -> Difference | None:
    """The mean of A minus that of B, of two independent samples, [size of A] and [size of B]: Welch's t test (1947).

    Of recipes, from one number a seed, for metrics that aren't means over items, such as a distance between sets of
    images: the images then count as fixed. None if a sample has one value: its spread is then unknown.
    """
    if min(len(a), len(b)) < 2:
        return None
    terms = [(np.var(values, ddof=1) / len(values), len(values) - 1) for values in (a, b)]
    return _difference(float(np.mean(a) - np.mean(b)), terms)


def recipe_difference(a: np.ndarray, b: np.ndarray) -> Difference | None:
    """Recipe A minus recipe B over training seeds and items, from [seeds of A, items] and [seeds of B, items].

    The items are the same, in the same order; there are at least two. It answers whether the recipes would differ with
    other seeds and on other items of the same kind. With D the mean difference, its variance is estimated as

        s²(A) / seeds of A + s²(B) / seeds of B + max(0, s²(items) − m(A) / seeds of A − m(B) / seeds of B) / items,

    where s²(A) is the variance of the seeds' means, s²(items) that of the items' differences, and m(A) the mean square
    of seed × item, which both of these contain; D is held against a t distribution with Satterthwaite's (1946) degrees
    of freedom. The third term is what the recipes' own effect on single items adds.

    Simulated with random effects of seed, item, seed × item and recipe × item, 5 and 5 seeds, 50 items: the share of
    equal recipes that are called different at 5 %; and in parentheses of recipes that differ by 2. At the top are the
    effects' standard deviations, of a mean over all items; each number is of 8,000 trials or more:

    | seed, seed × item, recipe × item | 1, 0, 0 | 1, 1, 0 | 0.3, 1, 0 | 0.3, 1, 1 |
    |---|---|---|---|---|
    | this | 0.05 (0.77) | 0.04 (0.47) | 0.04 (0.72) | 0.05 (0.24) |
    | third term s²(items) / items | 0.05 (0.77) | 0.02 (0.37) | 0.01 (0.55) | 0.03 (0.19) |
    | Welch on the seeds' means | 0.05 (0.77) | 0.04 (0.47) | 0.04 (0.73) | 0.34 (0.63) |
    | paired over items, one seed each | 1.00 | 0.17 | 0.07 | 0.06 |

    A bootstrap of seeds and items has 0.13 in the first column. With 2 and 2, 3 and 3, or 3 and 5 seeds this has 0.02
    to 0.05, with 2 and 5 up to 0.07. Where one recipe's seeds spread 5 times as much as the other's, Welch's test and
    this have 0.05 with 5 and 5 seeds, 0.06 with 3 and 3, 0.07 with 3 and 5, and 0.11 with 2 and 5: run as many of each.

    Returns:
        None if a recipe has one seed: its spread over seeds is then unknown.
    """
    assert a.shape[1] == b.shape[1] >= 2, f"the same items are needed, two or more: {a.shape}, {b.shape}"
    if min(len(a), len(b)) < 2:
        return None
    num_items = a.shape[1]
    by_item = a.mean(axis=0) - b.mean(axis=0)
    shared = sum(_interaction(values) / len(values) for values in (a, b))
    terms = [(np.var(values.mean(axis=1), ddof=1) / len(values), len(values) - 1) for values in (a, b)]
    terms.append((max(0.0, np.var(by_item, ddof=1) - shared) / num_items, num_items - 1))
    return _difference(float(by_item.mean()), terms)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted so that any false verdict among them has at most the level (Holm 1979), in their order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _interaction(values: np.ndarray) -> float:
    """Mean square of seed × item, of [seeds, items]: what remains of each value beside its seed's and item's means."""
    rest = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    return float((rest**2).sum() / ((values.shape[0] - 1) * (values.shape[1] - 1)))


def _difference(mean: float, terms: list[tuple[float, int]]) -> Difference:
    """From the terms of its variance, each with its degrees of freedom (Satterthwaite 1946)."""
    from scipy.special import stdtr, stdtrit

    variance = float(sum(term for term, _ in terms))
    if variance == 0:  # all values are the same in each recipe, as of an accuracy of 1
        return Difference(mean, mean, mean, p=float(mean == 0), df=float(sum(df for _, df in terms)))
    df = variance**2 / sum(term**2 / df for term, df in terms)
    error = variance**0.5
    half = float(stdtrit(df, 0.975)) * error
    return Difference(mean, mean - half, mean + half, p=float(2 * stdtr(df, -abs(mean) / error)), df=float(df))

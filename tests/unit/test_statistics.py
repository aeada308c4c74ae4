"""Differences of means and their verdicts: by hand, held against SciPy, and by simulation."""

import numpy as np
import pytest
from scipy import stats

from sdtrain.ground.statistics import holm, recipe_difference, t_interval, welch_difference

A = np.array([[1.0, 3.0, 5.0], [2.0, 4.0, 9.0]])
B = np.array([[0.0, 1.0, 2.0], [1.0, 3.0, 5.0], [2.0, 2.0, 2.0]])


def test_interval_of_a_mean_by_hand():
    """Mean 2, sd 1, standard error 1/√3, and t(2 df) at 97.5 % is 4.302653."""
    half = 4.302653 / 3**0.5
    assert t_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_seeds_alone_are_welchs_test():
    a, b = np.array([0.049, 0.050, 0.048, 0.051]), np.array([0.046, 0.047, 0.0425])
    found, expected = welch_difference(a, b), stats.ttest_ind(a, b, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert (found.ci_low, found.ci_high) == pytest.approx((low, high))
    assert (found.p, found.df) == pytest.approx((expected.pvalue, expected.df))


def test_recipes_by_hand():
    """The three terms of the variance, worked out on paper.

    Means of A's seeds: 3, 5, their variance 2; of B's: 1, 3, 2, theirs 1. Means by item: A 1.5, 3.5, 7; B 1, 2, 3;
    their differences 0.5, 1.5, 4 have the mean 2 and the variance 13/4. What remains in A beside its means is
    ±(0.5, 0.5, -1) in both seeds, its mean square 3 / 2. In B it is (0, 0, 0), (-1, 0, 1), (1, 0, -1): 4 / 4.
    """
    terms = np.array([2 / 2, 1 / 3, (13 / 4 - (3 / 2) / 2 - 1 / 3) / 3])
    variance = terms.sum()
    df = variance**2 / (terms**2 / [1, 2, 2]).sum()
    found = recipe_difference(A, B)
    assert (found.mean, found.df) == pytest.approx((2, df))
    assert (found.ci_low, found.ci_high) == pytest.approx(stats.t.interval(0.95, df, 2, variance**0.5))
    assert found.p == pytest.approx(2 * stats.t.sf(2 / variance**0.5, df))


def test_items_whose_differences_are_the_seeds_noise_alone_add_nothing():
    """Here all items differ by 6, so the third term, (0 - 1/2 - 1/2) / 2, is cut off: Welch's test remains."""
    a = np.array([[1.0, 0.0], [1.0, 2.0]])
    b = np.array([[5.0, 6.0], [9.0, 8.0]])
    found, expected = recipe_difference(a, b), welch_difference(a.mean(axis=1), b.mean(axis=1))
    assert vars(found) == pytest.approx(vars(expected))


def test_order_of_seeds_and_items_is_of_no_matter_and_swapping_recipes_turns_the_sign():
    found = recipe_difference(A, B)
    assert vars(recipe_difference(A[::-1, [2, 0, 1]], B[[1, 2, 0]][:, [2, 0, 1]])) == pytest.approx(vars(found))
    turned = recipe_difference(B, A)
    assert (turned.mean, turned.ci_low, turned.ci_high) == pytest.approx((-found.mean, -found.ci_high, -found.ci_low))
    assert (turned.p, turned.df) == pytest.approx((found.p, found.df))


def test_identical_recipes_do_not_differ():
    found = recipe_difference(A, A)
    assert (found.mean, found.p) == (0, 1)
    assert found.ci_low < 0 < found.ci_high


@pytest.mark.parametrize(("value", "p"), [(1.0, 1.0), (0.5, 0.0)])
def test_values_without_any_spread(value, p):
    found = recipe_difference(np.ones((2, 3)), np.full((3, 3), value))
    assert (found.mean, found.ci_low, found.ci_high, found.p) == (1 - value, 1 - value, 1 - value, p)


def test_one_seed_gives_no_verdict():
    assert recipe_difference(A[:1], B) is None
    assert recipe_difference(A, B[:1]) is None
    assert welch_difference(A[:, 0], B[:1, 0]) is None


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.03, 0.04, times 4, 3, 2, 1, none less than the one before."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("seed_sd", "interaction_sd", "recipe_item_sd"), [(1, 0, 0), (0.3, 1, 0), (0.3, 1, 1), (0.3, 0, 1)]
)
def test_level_holds_whatever_the_spread_comes_from(seed_sd, interaction_sd, recipe_item_sd):
    """Recipes that don't differ, 5 seeds each, 50 items: at most 5 % are called different, up to 4 standard errors."""
    rng, num_trials, num_items = np.random.default_rng(0), 600, 50
    wrong = 0
    for _ in range(num_trials):
        item = 3 * rng.standard_normal(num_items)
        a, b = (
            item
            + num_items**0.5 * recipe_item_sd * rng.standard_normal(num_items)
            + seed_sd * rng.standard_normal((5, 1))
            + num_items**0.5 * interaction_sd * rng.standard_normal((5, num_items))
            for _ in range(2)
        )
        wrong += recipe_difference(a, b).p < 0.05
    assert wrong / num_trials <= 0.05 + 4 * (0.05 * 0.95 / num_trials) ** 0.5


def test_level_test_has_power():
    """The same with a difference of three standard deviations of a seed is found nearly always."""
    rng, num_trials = np.random.default_rng(1), 200
    found = 0
    for _ in range(num_trials):
        item = rng.standard_normal(50)
        a, b = (item + rng.standard_normal((5, 1)) + shift for shift in (0, 3))
        found += recipe_difference(a, b).p < 0.05
    assert found / num_trials > 0.9

"""Near copies of training images: by hand, and of simulated models that copy nothing, or something."""

import numpy as np
import pytest

from sdtrain.evaluation.neighbors import Neighbors, near_copies, nearest_neighbors


def turned(*degrees: float, length: float = 1.0) -> np.ndarray:
    """Unit vectors of the plane."""
    angles = np.radians(degrees)
    return length * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def chord(degrees: float) -> float:
    return 2 * np.sin(np.radians(degrees) / 2)


def test_the_nearest_training_image_is_found_over_all_batches_whatever_the_features_length():
    train = [(["at 0", "at 90"], turned(0, 90)), (["at 40"], turned(40, length=5))]
    sets = {"real": [turned(170, 200, 260)], "trained": [turned(10, 80, 50, length=3)]}
    found = nearest_neighbors(sets, train)["trained"]
    assert found.items == ["at 0", "at 90", "at 40"]
    assert found.distances == pytest.approx(np.full(3, chord(10)))


def test_distances_are_compared_with_those_to_held_out_images_of_other_captions():
    """The image at 10° is 20° from the held-out one of the second caption; its own, at 11°, doesn't count."""
    sets = {"real": [turned(11, 30)], "trained": [turned(10, 35)]}
    found = nearest_neighbors(sets, [(["at 0"], turned(0))])
    assert found["trained"].ratios == pytest.approx([chord(10) / chord(20), chord(35) / chord(24)])
    assert found["real"].ratios == pytest.approx([chord(11) / chord(19), chord(30) / chord(19)])


def test_a_copy_has_the_ratio_zero_and_of_several_views_the_nearest_counts():
    sets = {"real": [turned(150, 170)], "trained": [turned(60, 20), turned(90, 25)]}
    found = nearest_neighbors(sets, [(["a"], turned(90))])["trained"]
    assert found.distances == pytest.approx([0, chord(65)], abs=1e-7)
    assert found.ratios[0] == 0


def neighbors(ratios: np.ndarray) -> Neighbors:
    return Neighbors([""] * len(ratios), ratios, ratios)


def test_near_copies_have_a_ratio_below_that_of_all_but_5_percent_of_held_out_images():
    held_out = np.linspace(0.1, 1.1, 61)  # the 5 % quantile is the fourth, 0.15
    drawn = np.array([0.01, 0.14, 0.16, 0.9])
    found = {"real": neighbors(held_out), "base": neighbors(np.full(4, 0.2)), "trained": neighbors(drawn)}
    numbers, threshold = near_copies("clip", found)
    assert threshold == pytest.approx(0.15)
    assert numbers["near_copy_share_clip_base"] == 0
    assert numbers["near_copy_share_clip_trained"] == 0.5
    assert 0 < numbers["near_copy_share_clip_trained_ci_low"] < 0.5 < numbers["near_copy_share_clip_trained_ci_high"]
    assert near_copies("clip", {**found, "real": neighbors(held_out[:49])}) == ({}, None)


def test_where_held_out_images_are_copies_themselves_there_is_no_verdict(capsys):
    held_out = np.concatenate([np.zeros(10), np.ones(90)])
    found = dict.fromkeys(("real", "base", "trained"), neighbors(held_out))
    assert near_copies("clip", found) == ({}, None)
    assert "10 of 100 held-out images equal a training image" in capsys.readouterr().out


def shares(spread: float, num_copies: int, d: int, seed: int) -> dict[str, float]:
    """Of 100 drawn images whose features spread as far as this, and of which so many are copies but for some noise."""
    rng = np.random.default_rng(seed)
    train, real, drawn = (rng.standard_normal((num, d)) + 0.5 for num in (500, 100, 100))
    drawn = spread * (drawn - 0.5) + 0.5
    drawn[:num_copies] = train[:num_copies] + 0.2 * rng.standard_normal((num_copies, d))
    sets = {"real": [real], "base": [drawn], "trained": [drawn]}
    return near_copies("clip", nearest_neighbors(sets, [([str(n) for n in range(500)], train)]))[0]


@pytest.mark.parametrize("d", [8, 64])
@pytest.mark.parametrize("spread", [1.0, 0.8, 0.6])
def test_a_model_that_copies_nothing_has_few_near_copies_however_typical_what_it_draws_is(spread, d):
    found = [shares(spread, 0, d, seed) for seed in range(20)]
    assert np.mean([numbers["near_copy_share_clip_trained"] for numbers in found]) < 0.1
    assert np.mean([numbers["near_copy_share_clip_trained_ci_low"] > 0.1 for numbers in found]) <= 0.1


def test_some_copies_are_found():
    assert shares(0.8, 30, 64, 0)["near_copy_share_clip_trained_ci_low"] > 0.15

"""Near copies of training images, by hand."""

import numpy as np
import pytest

from sdtrain.evaluation.neighbors import Neighbors, near_copies, nearest_neighbors


def turned(*degrees: float, length: float = 1.0) -> np.ndarray:
    """Unit vectors of the plane."""
    angles = np.radians(degrees)
    return length * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_the_nearest_training_image_is_found_over_all_batches_whatever_the_features_length():
    train = [(["at 0", "at 90"], turned(0, 90)), (["at 40"], turned(40, length=5))]
    found = nearest_neighbors({"trained": turned(10, 80, 50, length=3)}, train)["trained"]
    assert found.items == ["at 0", "at 90", "at 40"]
    assert found.distances == pytest.approx(2 * np.sin(np.radians(10) / 2) * np.ones(3))


def test_a_copy_lies_at_distance_zero():
    found = nearest_neighbors({"trained": turned(90)}, [(["a"], turned(90))])["trained"]
    assert found.distances[0] == pytest.approx(0, abs=1e-7)


def test_near_copies_are_those_closer_than_all_but_5_percent_of_held_out_images():
    def at(distances: np.ndarray) -> Neighbors:
        return Neighbors(distances, [""] * len(distances))

    held_out = np.linspace(0.1, 1.1, 21)  # the 5 % quantile is the second, 0.15
    found = {"real": at(held_out), "base": at(np.full(4, 0.2)), "trained": at(np.array([0.01, 0.14, 0.16, 0.9]))}
    numbers, threshold = near_copies("clip", found)
    assert threshold == pytest.approx(0.15)
    assert numbers["near_copy_share_clip_base"] == 0
    assert numbers["near_copy_share_clip_trained"] == 0.5
    assert 0 < numbers["near_copy_share_clip_trained_ci_low"] < 0.5 < numbers["near_copy_share_clip_trained_ci_high"]
    assert near_copies("clip", {**found, "real": at(held_out[:19])}) == ({}, None), "19 have no closest 5 %"

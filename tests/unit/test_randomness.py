"""Draws as a function of (seed, purpose, place), and of nothing else."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.ground.randomness import generator, hash64, normal, uniform

WORD = st.integers(0, 2**64 - 1)
PLACE = st.tuples(WORD, WORD, WORD)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), purpose=st.text(max_size=9), place=PLACE)
def test_same_place_same_draw(seed, purpose, place):
    assert uniform(seed, purpose, *place) == uniform(seed, purpose, *place)


@settings(deadline=None)
@given(one=PLACE, other=PLACE)
def test_different_place_different_draw(one, other):
    assert (uniform(0, "noise", *one) == uniform(0, "noise", *other)) == (one == other)


@pytest.mark.parametrize("word", [2**53, 2**63 - 1, 2**63, 2**64 - 2])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_large_words_of_a_place_count_to_the_last_bit(word, index):
    place, neighbour = [5, 5, 5], [5, 5, 5]
    place[index], neighbour[index] = word, word + 1
    with warnings.catch_warnings(action="error"):
        assert uniform(0, "crop", *place) != uniform(0, "crop", *neighbour)


@settings(deadline=None)
@given(one=st.integers(0, 2**32 - 1), other=st.integers(0, 2**32 - 1))
def test_different_seed_different_draw(one, other):
    assert (uniform(one, "noise", 3) == uniform(other, "noise", 3)) == (one == other)


def test_different_purpose_different_draw():
    purposes = ["noise", "Noise", "noise ", "posterior", "timestep", "flip", "crop", "order", "scene", ""]
    assert len({uniform(0, purpose, 1, 2) for purpose in purposes}) == len(purposes)


def test_neighbouring_places_share_no_number():
    streams = [
        generator(0, "noise", *place).integers(0, 2**63, 100_000) for place in ((0, 0), (1, 0), (0, 1), (0, 0, 1))
    ]
    assert len(np.unique(np.concatenate(streams))) == 400_000


def test_draws_of_one_place_continue_its_stream():
    many = generator(4, "noise", 1).random(6)
    assert uniform(4, "noise", 1) == many[0]
    assert len(set(many)) == 6


def test_golden_uniform():
    assert uniform(0, "flip", 3, 5) == 0.9419858909928046
    assert uniform(2**32 - 1, "order") == 0.9104380298782846
    assert uniform(0, "crop", hash64("a picture's id")) == 0.5045934014933373


def test_golden_normal():
    drawn = normal(7, "noise", 1, 2, 3, shape=(2, 2))
    assert drawn.dtype == np.float32
    expected = [[0.9668034315109253, -1.1008293628692627], [-0.7676598429679871, -0.5791999697685242]]
    assert drawn == pytest.approx(np.array(expected), abs=1e-6)


def test_golden_hash():
    assert hash64("scene") == 9929270432112054263


def test_normal_has_the_moments_of_a_standard_normal():
    drawn = np.concatenate([normal(0, "noise", step, shape=(100,)) for step in range(2000)]).astype(np.float64)
    assert drawn.mean() == pytest.approx(0, abs=0.01)  # 4.5 standard errors
    assert drawn.std() == pytest.approx(1, abs=0.01)
    assert (drawn**4).mean() == pytest.approx(3, abs=0.1)


def test_uniform_over_places_is_uniform():
    counts = np.histogram([uniform(0, "flip", 7, position) for position in range(10_000)], bins=10, range=(0, 1))[0]
    assert counts.sum() == 10_000
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9  # χ² with 9 degrees of freedom, p = 0.001


def test_a_fourth_word_is_refused():
    with pytest.raises(AssertionError, match="three counter words"):
        generator(0, "noise", 1, 2, 3, 4)

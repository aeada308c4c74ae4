"""A plain photograph's object under other light: other shading, the same hue, and little of its own light."""

import colorsys

import numpy as np
import pytest

from sdtrain.data.degradations import degraded

SIDE = 64
Y, X = np.mgrid[:SIDE, :SIDE].astype(np.float32) / (SIDE - 1)
MASK = ((X - 0.5) ** 2 + (Y - 0.5) ** 2 < 0.16).astype(np.float32)
INSIDE = MASK > 0
IDS = [f"id {number}" for number in range(24)]
HUES = np.where(X[..., None] < 0.5, np.float32([0.6, 0.25, 0.2]), np.float32([0.2, 0.35, 0.6]))
"""Albedo of the object: red and blue halves, in linear light."""


def picture(light: np.ndarray) -> np.ndarray:
    """The object under a light [R, R], float32 [3, R, R] in -1..1."""
    return (np.clip(HUES * light[..., None], 0, 1) ** (1 / 2.2) * 2 - 1).transpose(2, 0, 1).astype(np.float32)


def luminance(image: np.ndarray) -> np.ndarray:
    """Of uint8 [3, R, R] or float32 in -1..1, in about linear light."""
    values = image / 255 if image.dtype == np.uint8 else (image + 1) / 2
    return np.tensordot([0.2126, 0.7152, 0.0722], values**2.2, 1)


def tilt(values: np.ndarray) -> float:
    """How much lighter the object's right is than its left, as the logarithm of their ratio."""
    return float(np.log(values[INSIDE & (X > 0.5)].mean() / values[INSIDE & (X < 0.5)].mean()))


def shading(values: np.ndarray) -> np.ndarray:
    """What differs between pixels of the same albedo: deviations in each half, relative to its mean."""
    halves = [values[INSIDE & half] for half in (X < 0.5, X >= 0.5)]
    return np.concatenate([half / half.mean() - 1 for half in halves])


def test_it_is_a_function_of_seed_and_id():
    image = picture(0.3 + 0.6 * X)
    assert np.array_equal(degraded(image, MASK, 0, "a"), degraded(image, MASK, 0, "a"))
    drawn = {degraded(image, MASK, seed, name).tobytes() for seed in (0, 1) for name in IDS}
    assert len(drawn) == 2 * len(IDS)
    found = degraded(image, MASK, 0, "a")
    assert (found.shape, found.dtype) == ((3, SIDE, SIDE), np.uint8)


def test_every_result_has_other_shading_than_the_picture():
    image = picture(0.25 + 0.75 * Y)
    original = shading(luminance(image))
    for name in IDS:
        found = shading(luminance(degraded(image, MASK, 0, name)))
        assert np.abs(found - original).mean() > 0.1, name


def test_the_kinds_differ_in_how_much_shading_they_add():
    """Of a picture that is lit evenly: albedo alone stays even, light from a side and shadows don't."""
    image = picture(np.full_like(X, 0.6))
    spread = np.array([shading(luminance(degraded(image, MASK, 0, name))).std() for name in IDS])
    assert 0.1 < (spread < 0.12).mean() < 0.7
    assert (spread > 0.2).mean() > 0.2


@pytest.mark.parametrize("half", [0, 1])
def test_hue_is_kept_mostly(half):
    image = picture(0.3 + 0.6 * Y)
    place = INSIDE & ((X > 0.55) if half else (X < 0.45))
    wanted = colorsys.rgb_to_hsv(*HUES[0, -1 if half else 0])[0]
    for name in IDS:
        color = (degraded(image, MASK, 0, name)[:, place] / 255.0) ** 2.2
        hue = colorsys.rgb_to_hsv(*color.mean(axis=1))[0]
        assert abs((hue - wanted + 0.5) % 1 - 0.5) < 0.06, name


def test_little_is_left_of_the_pictures_own_light():
    """The same object under opposite lights, and at a quarter of the exposure, gives much the same."""
    left, right = picture(1 - 0.75 * X), picture(0.25 + 0.75 * X)
    before = tilt(luminance(right)) - tilt(luminance(left))
    for name in IDS:
        after = [tilt(luminance(degraded(image, MASK, 0, name))) for image in (left, right)]
        assert abs(after[1] - after[0]) < 0.5 * before, name
        levels = [luminance(degraded(image, MASK, 0, name))[INSIDE].mean() for image in (right, right_in_dusk())]
        assert 0.7 < levels[1] / levels[0] < 1.05, name


def right_in_dusk() -> np.ndarray:
    return picture((0.25 + 0.75 * X) / 4)


def test_what_is_outside_the_mask_does_not_count():
    image = picture(0.3 + 0.6 * X)
    other = np.where(INSIDE, image, -image)
    for name in IDS[:6]:
        found = [degraded(pixels, MASK, 0, name)[:, INSIDE] for pixels in (image, other)]
        assert np.array_equal(*found)


def test_a_mask_without_an_object_is_survived():
    """A crop may miss the object."""
    for name in IDS:
        degraded(picture(X), np.zeros_like(MASK), 0, name)


def test_a_highlight_stays_light_and_keeps_its_hue():
    """It is far above its surroundings, where a channel may not clip alone, nor wrap around."""
    spot = (X - 0.35) ** 2 + (Y - 0.5) ** 2 < 0.004
    image = picture(np.where(spot, 1.6, 0.15).astype(np.float32))
    wanted = colorsys.rgb_to_hsv(*HUES[0, 0])[0]
    for name in IDS:
        found = degraded(image, MASK, 0, name)
        colors = (found[:, spot] / 255.0) ** 2.2
        assert found[0, spot].min() > 120, name
        assert abs((colorsys.rgb_to_hsv(*colors.mean(axis=1))[0] - wanted + 0.5) % 1 - 0.5) < 0.06, name

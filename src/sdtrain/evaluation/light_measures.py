"""Does a picture of the lit world show its light, its colours and its object? Measured by arithmetic, no model needed.

Where the object is, and how it is curved, is known from its `LitScene`; all but the object's place is read from pixels
that the object covers by more than 95 %. Pictures are RGB; those of another size are scaled to 64 px.
"""

from itertools import combinations

import numpy as np
from PIL import Image

from sdtrain.data.lit_scenes import LIGHTS, SIDES, LitScene, albedo, direction, to_linear, transport
from sdtrain.data.scenes import COLORS, SIZE_PX, coverage
from sdtrain.ground.light import linear_to_srgb

_INSIDE = 0.95
"""Pixels that the object covers by more than this are the object's."""
_DIRECTED = 0.01
"""Sides that leave less than this share of the light when they cancel have no direction."""
_CONTRAST = 30.0
"""RGB distance from the wall, of 255 a channel, that can count as an object; the built-in VAE mostly errs by less."""
_TRIMMING_ROUNDS = 6


def light_angle_error(image: Image.Image, lit: LitScene, light_name: str) -> float:
    """The angle in degrees between the light on the object and the named one, both in the picture's plane.

    180 where the light on the object has no direction, as from the front alone.
    """
    inside = _inside(lit)
    strengths = _fitted_light(_linear(image), lit, inside)
    towards = strengths[: len(SIDES)] @ np.array(list(SIDES.values()))
    length = np.linalg.norm(towards)
    if length <= _DIRECTED * strengths.sum():
        return 180.0
    return float(np.degrees(np.arccos(np.clip(towards @ direction(light_name) / length, -1, 1))))


def albedo_error(image: Image.Image, lit: LitScene, light: np.ndarray) -> tuple[float, float]:
    """Relative error of the object's albedo under a light [1, 5, 3], and what is left of it at the best exposure.

    ‖Â-A‖/‖A‖, and the least ‖Â-αA‖/‖αA‖ of any α: the sine of the angle between the two.
    """
    found, wanted = _albedo(image, lit, light), albedo(lit.scene.color)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    projected = found * (found @ wanted) / max(found @ found, 1e-12)
    return float(error), float(np.linalg.norm(projected - wanted) / np.linalg.norm(wanted))


def named_color(image: Image.Image, lit: LitScene, light: np.ndarray) -> str:
    """The colour of `COLORS` nearest in sRGB to the object's albedo under a light [1, 5, 3]."""
    found = 255 * linear_to_srgb(_albedo(image, lit, light))
    return min(COLORS, key=lambda name: float(np.linalg.norm(np.array(COLORS[name]) - found)))


def foreground_iou(image: Image.Image, lit: LitScene) -> float:
    """Intersection over union of the object that the picture shows with where it should be.

    The wall's light changes linearly across it, so a plane a channel, fitted to the pixels around the object without
    those that fit worst, says how the wall looks everywhere. How the object should differ from it follows from its
    colour and the light fitted to it; if the median pixel differs less, as an object of a wrong colour may, all should.
    A pixel that differs by half as much or more is the object's. Two kinds of pixels count neither way: those on the
    outline, and those where the object would look like the wall (a white dome's shaded side before a gray wall).
    """
    pixels, covered = _linear(image), coverage(lit.scene, lit.placement)
    inside, outside = covered > _INSIDE, covered == 0
    behind = _fitted_wall(pixels, outside)
    tint = albedo(lit.scene.color)
    strengths = _fitted_light(pixels, lit, inside)
    expected = np.einsum("khw,k->hw", transport(lit), strengths)[:, :, None] * tint / tint.mean()

    wanted, found = _distance(expected, behind), _distance(pixels, behind)
    inside &= wanted > _CONTRAST
    if not inside.any():
        return 0.0
    scale = min(1.0, np.median(found[inside] / wanted[inside]))
    shown = found > np.maximum(_CONTRAST, scale * wanted / 2)
    union = inside.sum() + (shown & outside).sum()
    return float((shown & inside).sum() / union)


def linearity_error(first: Image.Image, second: Image.Image, both: Image.Image, lit: LitScene) -> float:
    """‖I₁+I₂-I₁₂‖/‖I₁₂‖ of the object in linear light, drawn under two lights and under their sum.

    A model that ignores the light gets 1, as a black I₁₂ does. Judge it together with `sensitivity`.
    """
    a, b, c = (_linear(image)[_inside(lit)] for image in (first, second, both))
    return float(np.linalg.norm(a + b - c) / np.linalg.norm(c)) if c.any() else 1.0


def sensitivity(first: Image.Image, second: Image.Image, both: Image.Image, lit: LitScene) -> float:
    """‖I₁-I₂‖/‖I₁₂‖ of the object in linear light: 0 for a model that ignores the light, and where I₁₂ is black."""
    a, b, c = (_linear(image)[_inside(lit)] for image in (first, second, both))
    return float(np.linalg.norm(a - b) / np.linalg.norm(c)) if c.any() else 0.0


def _linear(image: Image.Image) -> np.ndarray:
    """The picture in linear light, float64 [64, 64, 3]."""
    if image.size != (SIZE_PX, SIZE_PX):
        image = image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)
    return to_linear(image.convert("RGB"))


def _inside(lit: LitScene) -> np.ndarray:
    """Which pixels are the object's, bool [64, 64]."""
    return coverage(lit.scene, lit.placement) > _INSIDE


def _albedo(image: Image.Image, lit: LitScene, light: np.ndarray) -> np.ndarray:
    """The light that the object reflects over the light that it receives, [3]."""
    inside = _inside(lit)
    received = transport(lit)[:, inside].sum(axis=1) @ light[0]
    assert (received > 0).all(), f"the albedo can't be read where a colour of the light is missing: {received}"
    return _linear(image)[inside].sum(axis=0) / received


def _fitted_light(pixels: np.ndarray, lit: LitScene, where: np.ndarray) -> np.ndarray:
    """Strengths >= 0 of the basis lights, float64 [5], that explain the pixels' mean over channels best.

    A linear fit of the normals alone is wrong by up to 4° on exact pictures, since light stops at grazing angles.
    """
    transports, seen = transport(lit)[:, where], pixels.mean(axis=2)[where]
    gram, projected = transports @ transports.T, transports @ seen
    best, least = np.zeros(len(LIGHTS)), 0.0
    for number in range(1, len(LIGHTS) + 1):  # non-negative least squares: the best of all sets of lights that are on
        for on in map(list, combinations(range(len(LIGHTS)), number)):
            strengths = np.zeros(len(LIGHTS))
            strengths[on] = np.linalg.lstsq(gram[np.ix_(on, on)], projected[on], rcond=None)[0]
            error = strengths @ gram @ strengths - 2 * strengths @ projected
            if strengths.min() >= 0 and error < least:
                best, least = strengths, error
    return best


def _fitted_wall(pixels: np.ndarray, where: np.ndarray) -> np.ndarray:
    """A plane a channel, fitted to the better half of the pixels in `where` again and again: float64 [64, 64, 3]."""
    across = np.mgrid[:SIZE_PX, :SIZE_PX] / SIZE_PX
    terms = np.stack([np.ones((SIZE_PX, SIZE_PX)), *across], axis=2)
    kept = where
    for _ in range(_TRIMMING_ROUNDS):
        wall = np.clip(terms @ np.linalg.lstsq(terms[kept], pixels[kept], rcond=None)[0], 0, 1)
        distance = np.abs(pixels - wall).sum(axis=2)
        kept = where & (distance <= np.median(distance[where]))
    return wall


def _distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How different two pictures in linear light look: RGB distance in sRGB, 0..442, [64, 64]."""
    return 255 * np.linalg.norm(linear_to_srgb(first) - linear_to_srgb(second), axis=2)

"""The foreground of a plain photograph: the same object under some other light, so that the photograph is its answer.

An approximation of how IC-Light degrades its in-the-wild images (Zhang et al. 2025), which takes albedo from several
networks, shading from estimated normals, and shadows from a library of textures. Here albedo is a retinex (Land 1986):
in linear light, each pixel is divided by a smooth estimate of the light that falls around it. So the picture's own
shading goes where it is smooth, and stays where it is fine (folds, cast shadows' edges); what is large, of one colour
and dark becomes lighter.
"""

import math

import cv2
import numpy as np

from sdtrain.ground import randomness
from sdtrain.ground.light import linear_to_srgb, srgb_to_linear

_LUMINANCE = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # of linear sRGB (Rec. 709)
_SHARE_OF_SIDE = (0.08, 0.2)
"""Standard deviation of the blur that estimates shading, in sides of the square."""
_DARKEST = 0.02
"""Added to the estimate, so that noise in black parts isn't blown up."""
_LEVEL = 0.35
"""Mean luminance of what remains, whatever the picture's exposure was."""
_SHADE = (0.15, 0.5)
"""How bright the dark side and the shadows are, as a share of the lit ones."""
_TINT, _EXPOSURE = 0.06, 0.25
"""Standard deviations of the logarithms of each channel's gain, and of their common one."""


def degraded(image: np.ndarray, mask: np.ndarray, seed: int, sample_id: str) -> np.ndarray:
    """The picture's object under other light, uint8 [3, R, R]; what is outside the mask has no meaning.

    One third each, drawn from (seed, sample id): albedo alone; albedo under a light from one side; albedo with the
    shadows of stripes or blobs. All get a slight tint and another exposure.

    Args:
        image: float32 [3, R, R] in -1..1.
        mask: float32 [R, R] in 0..1.
    """
    rng = randomness.generator(seed, "degraded foreground", randomness.hash64(sample_id))
    light = _albedo(srgb_to_linear((image.transpose(1, 2, 0) + 1) / 2), mask, rng.uniform(*_SHARE_OF_SIDE))
    shading = (_no_shading, _from_one_side, _shadows)[rng.integers(3)]
    gains = np.exp(rng.normal(0, _TINT, 3) + rng.normal(0, _EXPOSURE)).astype(np.float32)
    light = light * shading(mask, rng)[..., None] * gains
    light /= np.maximum(1, light.max(axis=2, keepdims=True))  # clipping single channels would change the hue
    return (linear_to_srgb(light) * 255).round().astype(np.uint8).transpose(2, 0, 1)


def _albedo(light: np.ndarray, mask: np.ndarray, share_of_side: float) -> np.ndarray:
    """Linear light [R, R, 3] without what is smooth in its luminance; only what the mask covers counts."""
    sigma = share_of_side * len(mask)
    covered = _blurred(mask, sigma)
    around = _blurred(light @ _LUMINANCE * mask, sigma) / np.maximum(covered, 1e-6)
    return light * (_LEVEL / (around + _DARKEST))[..., None]


def _no_shading(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.ones_like(mask)


def _from_one_side(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A soft step across the object, from dark to lit, in any direction: float32 [R, R] in 0..1."""
    across = _across(mask, rng.uniform(0, 2 * math.pi))
    return _between(rng.uniform(*_SHADE), _step(across - rng.uniform(-0.3, 0.3), softness=rng.uniform(0.15, 0.5)))


def _shadows(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Parallel stripes, or blobs, with soft edges: float32 [R, R] in 0..1."""
    if rng.random() < 0.5:
        num_periods, phase = rng.uniform(1, 4), rng.uniform(0, 2 * math.pi)
        pattern = np.sin(math.pi * num_periods * _across(mask, rng.uniform(0, math.pi)) + phase)
    else:
        noise = rng.standard_normal(mask.shape, dtype=np.float32)
        pattern = _blurred(noise, rng.uniform(0.05, 0.12) * len(mask))
        pattern = (pattern - pattern.mean()) / (pattern.std() + 1e-6)
    return _between(rng.uniform(*_SHADE), _step(pattern, softness=rng.uniform(0.1, 0.4)))


def _across(mask: np.ndarray, angle: float) -> np.ndarray:
    """Position along a direction, -1..1 over the object's longer side, float32 [R, R]."""
    rows, columns = np.nonzero(mask > 0.5)
    if not len(rows):
        rows, columns = np.arange(len(mask)), np.arange(len(mask))
    center_y, center_x = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
    half = max(np.ptp(rows), np.ptp(columns), 1) / 2
    y, x = np.mgrid[: len(mask), : len(mask)].astype(np.float32)
    return ((x - center_x) * math.cos(angle) + (y - center_y) * math.sin(angle)) / half


def _step(values: np.ndarray, softness: float) -> np.ndarray:
    """From 0 to 1 around 0."""
    return 1 / (1 + np.exp(np.clip(-4 * values / softness, -60, 60)))


def _between(low: float, share: np.ndarray) -> np.ndarray:
    return (low + (1 - low) * share).astype(np.float32)


def _blurred(values: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(values.astype(np.float32), (0, 0), sigma, borderType=cv2.BORDER_REFLECT)

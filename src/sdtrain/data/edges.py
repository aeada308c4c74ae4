"""Edges of an image, as a hint for a ControlNet."""

import cv2
import numpy as np

from sdtrain.ground import randomness

_LOW, _STEP = (50, 150), (50, 150)
"""Ranges of the lower threshold and of what the higher one adds to it, on gradients of 8-bit colours: around the 100
and 200 that people use."""


def canny_edges(image: np.ndarray, seed: int, sample_id: str) -> np.ndarray:
    """Edges one pixel wide, 255 on 0 (Canny 1986), uint8 [1, H, W], of an image in -1..1, float32 [3, H, W].

    The thresholds are drawn for each image from (seed, sample id): a ControlNet trained at one setting binds to it.
    """
    rng = randomness.generator(seed, "canny thresholds", randomness.hash64(sample_id))
    low = rng.uniform(*_LOW)
    high = low + rng.uniform(*_STEP)
    rgb = ((image.transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
    return cv2.Canny(rgb, low, high)[None]  # of all channels, as ControlNet's annotator: grey loses edges of hue

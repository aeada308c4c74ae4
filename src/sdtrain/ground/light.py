"""Light as numbers: the tone curve between pixels and linear light, and the size of light maps."""

import numpy as np

MAP_PX = 32
"""Height and width to which larger light maps are reduced (IC-Light, Zhang et al. 2025)."""


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    """sRGB in 0..1 to linear light (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values: np.ndarray) -> np.ndarray:
    """Linear light in 0..1 to sRGB (IEC 61966-2-1)."""
    return np.where(values <= 0.0031308, 12.92 * values, 1.055 * np.maximum(values, 0.0031308) ** (1 / 2.4) - 0.055)

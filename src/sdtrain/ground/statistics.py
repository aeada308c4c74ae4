"""Means with confidence intervals, as arithmetic on arrays."""

import numpy as np


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

"""Whether a run learned at all, told from its curves."""

from collections.abc import Mapping, Sequence

import numpy as np

_SMALL_SHARE = 0.25
"""A fall of the held-out loss by less than this share of the base's is small."""
_RISE_SHARE = 0.1
"""A rise above the base's loss by more than this share of it, before a small fall, is damage by large steps."""
_LINEAR_SHARE = 0.65
"""A run that got less than this share of its gain from the first half of its summed learning rate was still falling as
fast at its end: one that has learned flattens, and gets three quarters and more."""


def learning_fault(validation: Sequence[Mapping[str, float]], train: Sequence[Mapping[str, float]]) -> str | None:
    """Why a run seems to have a wrong learning rate or length, in a sentence; None if it learned.

    Args:
        validation: rows of metrics/validation.csv; the first is before training.
        train: rows of metrics/train.csv: of these `step` and `lr`.
    """
    kind = "loss_ema" if "loss_ema" in validation[0] else "loss_raw"
    base, rows = validation[0][kind], validation[1:]
    if not rows or not train:
        return None
    peak_lr, best, last = max(row["lr"] for row in train), min(rows, key=lambda row: row[kind]), rows[-1]
    if best[kind] >= base:
        return (
            f"training never lowered the held-out loss, {base:.5f} before it and {best[kind]:.5f} at best (step "
            f"{best['step']:.0f}): a learning rate of {peak_lr:.2g} is too high, or the captions don't fit the images"
        )
    if last[kind] > base:
        return (
            f"the held-out loss fell from {base:.5f} to {best[kind]:.5f} at step {best['step']:.0f} and ended at "
            f"{last[kind]:.5f}, above its start: a learning rate of {peak_lr:.2g} is too high, or the run too long"
        )
    gain, worst = base - best[kind], max(rows, key=lambda row: row["loss_raw"])
    rise = worst["loss_raw"] - validation[0]["loss_raw"]
    if gain < _SMALL_SHARE * base and rise > max(gain, _RISE_SHARE * base):
        return (
            f"the held-out loss rose from {base:.5f} to {worst['loss_raw']:.5f} at step {worst['step']:.0f} and fell "
            f"to {best[kind]:.5f} only: a learning rate of {peak_lr:.2g} is too high"
        )
    share = _share_of_first_half(validation, train)
    if gain < _SMALL_SHARE * base and share is not None and share < _LINEAR_SHARE:
        return (
            f"the held-out loss fell by {100 * gain / base:.1f} % only, from {base:.5f} to {best[kind]:.5f}, and at "
            f"the end as fast as at the start: a learning rate of {peak_lr:.2g} is too low, or the run too short"
        )
    return None


def _share_of_first_half(
    validation: Sequence[Mapping[str, float]], train: Sequence[Mapping[str, float]]
) -> float | None:
    """How much of the gain came with the first half of the summed learning rate: half of it, if the gain is linear.

    Of the raw weights, since an average lags behind. None with fewer than three validations.
    """
    if len(validation) < 4:
        return None
    steps = np.array([validation[0]["step"], *(row["step"] for row in train)])
    summed = np.concatenate([[0], np.cumsum(np.diff(steps) * [row["lr"] for row in train])])
    at = np.interp([row["step"] for row in validation], steps, summed)
    losses = np.array([row["loss_raw"] for row in validation])
    total = losses[0] - losses[-1]
    if total <= 0 or at[-1] <= 0:
        return None
    return float((losses[0] - np.interp(at[-1] / 2, at, losses)) / total)

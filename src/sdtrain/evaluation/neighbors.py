"""Which training images are nearest to what a model draws: does it copy them?

Distances are between features at unit length. How near any image lies to the training images depends on how typical it
is, and models draw more typical images than real ones are. So each distance is taken over that to the nearest held-out
image, of another caption: where images lie close to each other, both are small. Only a copy is much nearer to a
training image. A drawn image is a near copy if this ratio is below that of all but 5 % of the held-out images
themselves, on which nothing was trained.

Of models that copy nothing about 5 % are near copies: of simulated Gaussian sets with the spread of the real ones, or
0.8 or 0.6 of it, 5 to 8 % in 8, 32 and 384 dimensions, with 50 to 256 held-out images. Judged by distance alone up to
all of them were.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sdtrain.evaluation.set_metrics import unit_length
from sdtrain.ground.statistics import wilson_interval

NEAR_SHARE = 0.05
MIN_HELD_OUT = 50
"""With fewer the closest 5 % are too uncertain."""
_ZERO = 1e-6
"""Distances of equal images differ from 0 by rounding."""


@dataclass(frozen=True)
class Neighbors:
    """The nearest training image of each of a set of images."""

    items: list[str]
    """The training images' ids."""
    distances: np.ndarray
    """float64 [N], 0 to 2."""
    ratios: np.ndarray
    """The distances over those to the nearest held-out image; 0 of a copy."""


def nearest_neighbors(
    sets: dict[str, list[np.ndarray]], train: Iterable[tuple[Sequence[str], np.ndarray]]
) -> dict[str, Neighbors]:
    """The nearest training image of every image of each set, by set.

    Args:
        sets: features [N, d] of `real`, the held-out images, and of what models drew from their captions, in the same
            order. A list of them has features of the same images seen otherwise, such as mirrored: the nearest counts.
        train: ids and features [M, d] of training images, batch by batch, so that they needn't fit in memory.
    """
    views = {name: [unit_length(features) for features in found] for name, found in sets.items()}
    nearest = {name: np.full(len(found[0]), np.inf) for name, found in views.items()}
    items = {name: [""] * len(found[0]) for name, found in views.items()}
    for ids, features in train:
        known = unit_length(features)
        for name, found in views.items():
            distances = _distances(found, known)
            places = distances.argmin(axis=1)
            for number in np.flatnonzero(distances.min(axis=1) < nearest[name]):
                nearest[name][number] = distances[number, places[number]]
                items[name][number] = ids[places[number]]
    neighbors = {}
    for name, found in views.items():
        to_held_out = _distances(found, views["real"][0])
        np.fill_diagonal(to_held_out, np.inf)
        ratios = np.where(nearest[name] < _ZERO, 0.0, nearest[name] / np.maximum(to_held_out.min(axis=1), _ZERO))
        neighbors[name] = Neighbors(items[name], nearest[name], ratios)
    return neighbors


def near_copies(label: str, found: dict[str, Neighbors]) -> tuple[dict[str, float], float | None]:
    """The models' shares of near copies, `near_copy_share_<label>_<model>`, and the ratio below which one is.

    The trained model's share has Wilson's 95 % interval. Without 50 held-out images there are neither; nor if 5 % of
    these are copies of training images themselves, which is told.

    Args:
        found: of `real`, held-out images, `base` and `trained`.
    """
    held_out = found["real"].ratios
    if len(held_out) < MIN_HELD_OUT:
        return {}, None
    threshold = float(np.quantile(held_out, NEAR_SHARE))
    if threshold == 0:
        num = int((held_out == 0).sum())
        print(f"{num} of {len(held_out)} held-out images equal a training image: copies can't be told from others")
        return {}, None
    stem, near = f"near_copy_share_{label}", {name: found[name].ratios < threshold for name in ("base", "trained")}
    low, high = wilson_interval(int(near["trained"].sum()), len(near["trained"]))
    numbers = {f"{stem}_{name}": float(share.mean()) for name, share in near.items()}
    return numbers | {f"{stem}_trained_ci_low": low, f"{stem}_trained_ci_high": high}, threshold


def _distances(views: list[np.ndarray], known: np.ndarray) -> np.ndarray:
    """Of each image, by the nearest of its views, to each of the known ones: [N, M]."""
    nearness = np.max([view @ known.T for view in views], axis=0)
    return np.sqrt(np.maximum(2 - 2 * nearness, 0))

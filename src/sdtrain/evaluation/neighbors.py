"""Which training images are nearest to what a model draws: does it copy them?

Distances are between features at unit length. A drawn image is judged by how near held-out images, which nothing was
trained on, lie to training images: closer than all but 5 % of these is a near copy. A model that copies nothing has
about that share of near copies, if it draws as real images look, and fewer if it doesn't.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sdtrain.ground.statistics import wilson_interval

NEAR_SHARE = 0.05
_MIN_HELD_OUT = 20
"""With fewer there is no closest 5 %."""


@dataclass(frozen=True)
class Neighbors:
    """The nearest training image of each of a set of images."""

    distances: np.ndarray
    """float64 [N], 0 to 2."""
    items: list[str]
    """The training images' ids."""


def nearest_neighbors(
    sets: dict[str, np.ndarray], train: Iterable[tuple[Sequence[str], np.ndarray]]
) -> dict[str, Neighbors]:
    """The nearest training image of every image of each set, features [N, d]; by set.

    Args:
        train: ids and features [M, d] of training images, batch by batch, so that they needn't fit in memory.
    """
    units = {name: _unit_length(features) for name, features in sets.items()}
    nearest = {name: np.full(len(features), np.inf) for name, features in sets.items()}
    items = {name: [""] * len(features) for name, features in sets.items()}
    for ids, features in train:
        known = _unit_length(features)
        for name, unit in units.items():
            distances = np.sqrt(np.maximum(2 - 2 * (unit @ known.T), 0))
            places = distances.argmin(axis=1)
            for number in np.flatnonzero(distances.min(axis=1) < nearest[name]):
                nearest[name][number] = distances[number, places[number]]
                items[name][number] = ids[places[number]]
    return {name: Neighbors(nearest[name], items[name]) for name in sets}


def near_copies(label: str, found: dict[str, Neighbors]) -> tuple[dict[str, float], float | None]:
    """The models' shares of near copies, `near_copy_share_<label>_<model>`, and the distance below which one is.

    The trained model's share has Wilson's 95 % interval. Without 20 held-out images there are neither.

    Args:
        found: of `real`, held-out images, `base` and `trained`.
    """
    held_out = found["real"].distances
    if len(held_out) < _MIN_HELD_OUT:
        return {}, None
    threshold = float(np.quantile(held_out, NEAR_SHARE))
    stem, near = f"near_copy_share_{label}", {name: found[name].distances < threshold for name in ("base", "trained")}
    low, high = wilson_interval(int(near["trained"].sum()), len(near["trained"]))
    numbers = {f"{stem}_{name}": float(share.mean()) for name, share in near.items()}
    return numbers | {f"{stem}_trained_ci_low": low, f"{stem}_trained_ci_high": high}, threshold


def _unit_length(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)

"""Which way a metric is better."""

from fnmatch import fnmatchcase
from typing import Literal

Direction = Literal["lower", "higher"]

IMAGE_SET = "image_set"
"""In metrics/image_sets.json: a number that stands for encoder, items and captions; what an encoder says is comparable
only where it is the same."""
_BY_ENCODER = (
    *("mmd_polynomial_*", "mmd_rbf_*", "frechet_distance_*", "mind_*"),
    *("precision_*", "recall_*", "density_*", "coverage_*", "clip_score_*"),
)
"""By pattern of the name, what an image encoder says."""

_BETTER: dict[str, Direction] = {
    "best_validation_loss": "lower",
    "held_out_loss": "lower",
    "held_out_loss_*": "lower",
    "*_error": "lower",
    "*_error_deg": "lower",
    "*_accuracy": "higher",
    "*_iou": "higher",
    "mmd_polynomial_*": "lower",
    "mmd_rbf_*": "lower",
    "frechet_distance_*": "lower",
    "mind_*": "lower",
    "precision_*": "higher",
    "recall_*": "higher",
    "coverage_*": "higher",
    "clip_score_*": "higher",
}
"""By pattern of the name, without the model that it ends with.

What isn't here has no better direction: counts, bounds of intervals, and how much a condition or the light matters.
"""


def is_by_encoder(name: str) -> bool:
    """Whether a metric is what an image encoder says."""
    return any(fnmatchcase(name, pattern) for pattern in _BY_ENCODER)


def better_direction(name: str) -> Direction | None:
    """Of a number in `metrics/*.json`, e.g. `held_out_loss_trained`; None if it is no measure of the trained model."""
    stem = name.removesuffix("_trained")
    if stem == name and name != "best_validation_loss":
        return None
    return next((direction for pattern, direction in _BETTER.items() if fnmatchcase(stem, pattern)), None)

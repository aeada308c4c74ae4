"""What metrics' names tell: which way one is better, who says it, and of how many images."""

from fnmatch import fnmatchcase
from typing import Literal

Direction = Literal["lower", "higher"]

IMAGE_SET = "image_set"
"""In metrics/image_sets.json: a number that stands for encoder, items and captions; what an encoder says is comparable
only where it is the same."""
_OF_SETS = (
    *("mmd_polynomial_*", "mmd_rbf_*", "frechet_distance_*", "mind_*"),
    *("precision_*", "recall_*", "density_*", "coverage_*"),
)
"""By pattern of the name, what an image encoder says of a set of images."""
_COUNTS = {
    "num_held_out": ("held_out_loss", "held_out_loss_*", "*_gap"),
    "num_drawn_images": ("clip_score_*", "near_copy_share_*"),
    "num_set_images": _OF_SETS,
}
"""What counts a metric's images, and the patterns of the metrics' names, without the model that they end with."""

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
    return is_of_sets(name) or fnmatchcase(name, "clip_score_*")


def is_of_sets(name: str) -> bool:
    """Whether a metric is what an image encoder says of a set of images, and has no values of single ones."""
    return any(fnmatchcase(name, pattern) for pattern in _OF_SETS)


def counted_by(stem: str) -> str | None:
    """The number in `metrics/*.json` that is a metric's N; None if there is none.

    Args:
        stem: the metric's name, without the model that it ends with.
    """
    return next(
        (count for count, patterns in _COUNTS.items() if any(fnmatchcase(stem, pattern) for pattern in patterns)), None
    )


def better_direction(name: str) -> Direction | None:
    """Of a number in `metrics/*.json`, e.g. `held_out_loss_trained`; None if it is no measure of the trained model."""
    stem = name.removesuffix("_trained")
    if stem == name and name != "best_validation_loss":
        return None
    return next((direction for pattern, direction in _BETTER.items() if fnmatchcase(stem, pattern)), None)

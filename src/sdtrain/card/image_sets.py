"""The card's rows of what an image encoder says of drawn images."""

from collections.abc import Mapping
from pathlib import Path

from sdtrain.ground.errors import InputError

_LABELS = {
    "clip_score": "CLIPScore, higher is better",
    "mmd_polynomial": "1000 × MMD² with KID's kernel, lower is better",
    "mmd_rbf": "1000 × MMD² with CMMD's kernel, lower is better",
    "frechet_distance": "Fréchet distance, lower is better",
    "mind": "Monge Inception Distance, lower is better",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "near_copy_share": "share of near copies of training images, about 0.05 by chance",
}
"""Metrics in words, by how their names begin; the names go on with the encoder."""

Row = tuple[str, str, str, str]
"""Label, base, trained with its 95 % interval, N."""


def image_set_rows(numbers: Mapping[str, float], file: Path) -> list[Row]:
    """A row per metric of drawn images; none if no encoder was asked.

    Args:
        numbers: of metrics/image_sets.json, by name.
        file: where they stood.

    Raises:
        InputError: a number that belongs to another is missing.
    """
    return [_row(metric, encoder, numbers, file) for metric, encoder in _measured(numbers)]


def image_set_notes(numbers: Mapping[str, float]) -> list[str]:
    """What the rows are of, in sentences; none without rows."""
    encoders = sorted({encoder for _, encoder in _measured(numbers)})
    if not encoders:
        return []
    notes = [
        f"Drawn images were judged by the image encoder {', '.join(encoders)}; what another says, or of other images, "
        "can't be compared."
    ]
    if "num_set_images" in numbers:
        notes.append(
            "What real images get in the trained model's place stands in the first column, with the middle 95 % of "
            "random halvings."
        )
    return notes


def _measured(numbers: Mapping[str, float]) -> list[tuple[str, str]]:
    """Metric and encoder of each of the trained model's numbers, in the order of the labels."""
    stems = [name.removesuffix("_trained") for name in numbers if name.endswith("_trained")]
    return [
        (metric, stem.removeprefix(f"{metric}_"))
        for metric in _LABELS
        for stem in stems
        if stem.startswith(f"{metric}_")
    ]


def _row(metric: str, encoder: str, numbers: Mapping[str, float], file: Path) -> Row:
    stem = f"{metric}_{encoder}"

    def number(name: str) -> float:
        if name not in numbers:
            raise InputError(f"{file}: has {stem}_trained and no {name}; run `dvc repro evaluate`")
        return numbers[name]

    def with_bounds(name: str) -> str:
        value, low, high = (number(f"{name}{end}") for end in ("", "_ci_low", "_ci_high"))
        return f"{value:.4g} ({low:.4g} to {high:.4g})"

    label, num = _LABELS[metric], "num_drawn_images"
    if f"{stem}_floor" in numbers:
        label, num = f"{label}; real images {with_bounds(f'{stem}_floor')}", "num_set_images"
    elif f"{stem}_real" in numbers:
        label = f"{label}; real images {number(f'{stem}_real'):.4g}"
    return label, f"{number(f'{stem}_base'):.4g}", with_bounds(f"{stem}_trained"), f"{number(num):.0f} images"

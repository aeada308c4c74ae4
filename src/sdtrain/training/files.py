"""The paths that a training run reads and writes."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainFiles:
    """Folders and files of one run."""

    base: Path
    """The base model."""
    latents: Path
    """The latent cache."""
    checkpoints: Path
    """Out: the best checkpoints and the last."""
    metrics: Path
    """Out: the summary, JSON."""
    train_curve: Path
    """Out: the training curve, CSV, as are the other two."""
    speed_curve: Path
    validation_curve: Path
    validation_images: Path
    """Out: a folder for each validation prompt, with an image for each step."""
    runs: Path
    """The trackers' files."""
    states: Path
    """Saved states; not an out, because DVC deletes outs before a stage runs."""

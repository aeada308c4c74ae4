"""Images beside the matrix: what models drew while they trained, and what `evaluate` found."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from sdtrain.ground.errors import InputError
from sdtrain.ground.pictures import NEIGHBORS, WORST, Neighbors, Pair, Worst
from sdtrain.ground.records import check_record
from sdtrain.tools.report.recorded import EVALUATION, VALIDATION, Recorded
from sdtrain.tools.report.thumbnails import Gallery, Picture


@dataclass
class Track:
    """One run's images of a prompt while it trained."""

    run: str
    steps: dict[int, Picture]


@dataclass
class Prompt:
    """Images of a prompt while the runs trained."""

    text: str
    tracks: list[Track]


@dataclass
class Found:
    """What `evaluate` found of one run."""

    run: str
    worst: list[tuple[Worst, Picture]] = field(default_factory=list)
    no_worst: str | None = None
    """Why there are none."""
    neighbors: Neighbors | None = None
    no_neighbors: str | None = None
    pairs: list[tuple[Pair, Picture, Picture]] = field(default_factory=list)


def validation_images(runs: list[Recorded], gallery: Gallery) -> tuple[list[Prompt], list[tuple[str, str]]]:
    """Images by prompt, run and step, prompts in their order; and runs that lack them, with the reason."""
    prompts: dict[str, dict[str, Track]] = {}
    for run in runs:
        folder = run.outs[VALIDATION]
        for name, file in sorted(folder.files.items(), key=lambda item: _by_number(item[0])):
            match = re.fullmatch(r"([^/]+)/(\d+)\.png", name)
            picture = gallery.add(file) if match else None
            if match and picture:
                tracks = prompts.setdefault(_prompt_of(file) or match[1], {})
                tracks.setdefault(run.name, Track(run.name, {})).steps[int(match[2])] = picture
    notes = [(run.name, reason) for run in runs if (reason := run.outs[VALIDATION].missing)]
    return [Prompt(text, list(tracks.values())) for text, tracks in prompts.items()], notes


def evaluation_images(run: Recorded, gallery: Gallery) -> Found:
    """What `evaluate` found of a run."""
    folder, found = run.outs[EVALUATION], Found(run.name)
    try:
        worst = check_record(folder.json(WORST), list[Worst], f"{EVALUATION}/{WORST}", "evaluate")
        pictures = [(entry, gallery.find(folder, entry.image)) for entry in worst]
        found.worst = [(entry, picture) for entry, picture in pictures if picture]
    except InputError as fault:
        found.no_worst = str(fault)
    try:
        found.neighbors = check_record(folder.json(NEIGHBORS), Neighbors, f"{EVALUATION}/{NEIGHBORS}", "evaluate")
    except InputError as fault:
        found.no_neighbors = str(fault)
        return found
    if found.neighbors.features is None:
        found.no_neighbors = "it was evaluated without an image encoder (evaluate.features)"
    elif not found.neighbors.pairs:
        found.no_neighbors = "it wasn't compared with training images (evaluate.nearest_neighbors)"
    for pair in found.neighbors.pairs:
        sample, train = (gallery.find(folder, name) for name in (pair.sample, pair.train))
        if sample and train:
            found.pairs.append((pair, sample, train))
    return found


def _by_number(name: str) -> list:
    """So that 2 comes before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _prompt_of(file: Path) -> str | None:
    """What the image was drawn from, as `training/images.py` notes it."""
    with Image.open(file) as image:
        text = getattr(image, "text", {})
    return text.get("prompt")

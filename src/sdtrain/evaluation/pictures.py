"""Writes `data/evaluation`, which `ground/pictures.py` describes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdtrain.data.shards import LatentShards
from sdtrain.evaluation.drawn_images import DrawnImages, cropped_images
from sdtrain.evaluation.image_comparison import Comparison
from sdtrain.ground.files import write_json
from sdtrain.ground.pictures import NEIGHBORS, WORST, Neighbors, Pair, Worst

_NUM_SHOWN = 8
_MAX_SIDE_PX = 256
MAX_BYTES = 3 * _NUM_SHOWN * 3 * _MAX_SIDE_PX**2
"""Of all images, before PNG's compression."""


def write_worst(
    folder: Path,
    shards: LatentShards,
    dataset: Path,
    items: Sequence[str],
    captions: Sequence[str],
    losses: dict[str, np.ndarray],
) -> None:
    """Write `worst.json` and its images.

    Args:
        shards: of the held-out split.
        dataset: the folder `data/dataset`.
        items: the held-out images' ids.
        losses: of `base` and `trained`, [items].
    """
    order = np.argsort(-losses["trained"], kind="stable")[:_NUM_SHOWN]
    found = dict(cropped_images(shards, dataset, {items[place] for place in order}))
    rows = [
        Worst(
            item=items[place],
            text=captions[place],
            image=_save(found[items[place]], folder, f"worst/{rank:02}.png"),
            loss_base=float(losses["base"][place]),
            loss_trained=float(losses["trained"][place]),
        )
        for rank, place in enumerate(order)
    ]
    write_json(folder / WORST, [row.model_dump() for row in rows])


def write_neighbors(
    folder: Path,
    compared: Comparison,
    images: DrawnImages,
    shards: LatentShards,
    dataset: Path,
) -> None:
    """Write `neighbors.json` and its images.

    Args:
        shards: of the training images.
    """
    pairs, found = [], compared.nearest
    if found is not None:
        order = np.argsort(found.ratios, kind="stable")[:_NUM_SHOWN]
        train = dict(cropped_images(shards, dataset, {found.items[place] for place in order}))
        pairs = [
            Pair(
                text=images.captions[place],
                item=found.items[place],
                sample=_save(images.drawn["trained"][place], folder, f"neighbors/{rank:02}-sample.png"),
                train=_save(train[found.items[place]], folder, f"neighbors/{rank:02}-train.png"),
                distance=float(found.distances[place]),
                ratio=float(found.ratios[place]),
            )
            for rank, place in enumerate(order)
        ]
    shown = Neighbors(
        features=compared.features, num_samples=len(images.items), threshold=compared.threshold, pairs=pairs
    )
    write_json(folder / NEIGHBORS, shown.model_dump())


def _save(image: Image.Image, folder: Path, name: str) -> str:
    small = image.copy()
    small.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX), Image.Resampling.LANCZOS)
    (folder / name).parent.mkdir(exist_ok=True)
    small.save(folder / name)
    return name

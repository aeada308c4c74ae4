"""`data/evaluation`: images to look at beside the metrics, PNG files of up to 256 px a side.

- `worst.json`: the held-out images with the highest loss, highest first, each with `item`, `text`, `image` (its file
  below the folder), `loss_base` and `loss_trained`.
- `neighbors.json`: `features`, the encoder's name, `num_samples`, the number of drawn images, `threshold`, the ratio
  below which one is a near copy (null where too few images are held out), and `pairs`: the drawn images with the lowest
  ratios, lowest first, each with `text`, `sample` and `train` (files), `item`, the training image's id, `distance`, and
  `ratio`, over the distance to the nearest held-out image. Without an encoder `features` is null; if images weren't
  compared with training images, there are no pairs.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdtrain.data.shards import LatentShards
from sdtrain.evaluation.drawn_images import DrawnImages, cropped_images
from sdtrain.evaluation.image_comparison import Comparison
from sdtrain.ground.files import write_json

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
    rows = []
    for rank, place in enumerate(order):
        row = {"item": items[place], "text": captions[place]}
        row["image"] = _save(found[items[place]], folder, f"worst/{rank:02}.png")
        rows.append(row | {f"loss_{name}": float(losses[name][place]) for name in ("base", "trained")})
    write_json(folder / "worst.json", rows)


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
        for rank, place in enumerate(order):
            row = {"text": images.captions[place], "item": found.items[place]}
            row["sample"] = _save(images.drawn["trained"][place], folder, f"neighbors/{rank:02}-sample.png")
            row["train"] = _save(train[found.items[place]], folder, f"neighbors/{rank:02}-train.png")
            pairs.append(row | {"distance": float(found.distances[place]), "ratio": float(found.ratios[place])})
    tree = {"features": compared.features, "num_samples": len(images.items), "threshold": compared.threshold}
    write_json(folder / "neighbors.json", {**tree, "pairs": pairs})


def _save(image: Image.Image, folder: Path, name: str) -> str:
    small = image.copy()
    small.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX), Image.Resampling.LANCZOS)
    (folder / name).parent.mkdir(exist_ok=True)
    small.save(folder / name)
    return name

"""Drawn images seen through an image encoder: beside real ones, with their captions, and beside training images."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import ImageOps
from transformers import CLIPTextModel

from sdtrain.data.shards import LatentShards, read_dataset
from sdtrain.evaluation.clip_score import CaptionFeatures, load_caption_features
from sdtrain.evaluation.drawn_images import DrawnImages, cropped
from sdtrain.evaluation.faults import copied
from sdtrain.evaluation.features import ImageFeatures, load_features
from sdtrain.evaluation.image_sets import caption_metrics, image_set_metrics
from sdtrain.evaluation.neighbors import Neighbors, near_copies, nearest_neighbors
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import sha256_json
from sdtrain.ground.manifests import FeaturesManifest
from sdtrain.ground.metric_names import IMAGE_SET
from sdtrain.ground.processes import ALONE, Processes
from sdtrain.ground.values import Values
from sdtrain.models.parts import pick_device
from sdtrain.params.schema import EvaluateParams


@dataclass(frozen=True)
class Comparison:
    """What an image encoder says of drawn images."""

    numbers: dict[str, float]
    features: str | None = None
    """The encoder's name and revision; None if there is none."""
    nearest: Neighbors | None = None
    """Of the trained model's images; None if they weren't compared with training images."""
    threshold: float | None = None
    """The ratio below which an image is a near copy; None for too few held-out images."""


@dataclass(frozen=True)
class Judge:
    """An image encoder, ready to be asked."""

    label: str
    """In the names of metrics."""
    features: ImageFeatures
    captions: CaptionFeatures | None
    """Of a CLIP."""


def load_judge(encoder: Path, text_encoder: CLIPTextModel) -> Judge | None:
    """The image encoder of the folder `data/features`; None if there is none.

    Args:
        text_encoder: the base's, which mustn't be the judge's.

    Raises:
        InputError: it can't be loaded, or is the CLIP whose captions the base understands.
    """
    label = FeaturesManifest.read(encoder).label
    if label is None:
        return None
    device = pick_device()
    features, captions = load_features(encoder, label, device), None
    if features.has_captions:
        captions = load_caption_features(encoder, device)
        if captions.is_same_text_encoder(text_encoder):
            raise InputError(
                f"evaluate.features: {features.name} has the base's own text encoder, so a model would be judged by a "
                "part of itself; take another CLIP, or a DINOv2 such as facebook/dinov2-small"
            )
    return Judge(label, features, captions)


def compare_images(
    params: EvaluateParams,
    seed: int,
    judge: Judge,
    images: DrawnImages,
    train: LatentShards,
    dataset: Path,
    values: Values,
    processes: Processes = ALONE,
) -> Comparison:
    """Set metrics, CLIPScore where the encoder is a CLIP, and the share of near copies; a model that copies is told.

    The images' own CLIPScores, and whether each is a near copy, are added to `values`.

    Args:
        dataset: the folder `data/dataset`.
    """
    label, features, size = judge.label, judge.features, params.batch_size
    sets = {"real": images.real, **images.drawn}
    found = {name: features.extract(some, size, processes) for name, some in sets.items()}
    drawn = {name: found[name] for name in images.drawn}
    numbers: dict[str, float] = {"num_drawn_images": len(images.items)}
    numbers[IMAGE_SET] = int(sha256_json([features.name, images.items, images.captions])[:12], 16)
    if processes.is_main:  # others don't need them
        numbers |= image_set_metrics(seed, label, found["real"], drawn)
    if judge.captions is not None:
        texts = judge.captions.extract(images.captions, size)
        of_images = images.items, images.captions, texts
        numbers |= caption_metrics(seed, params.num_bootstrap, label, *of_images, found, values)
    if not params.nearest_neighbors:
        return Comparison(numbers, features.name)
    views = {name: [features_of_set] for name, features_of_set in found.items()}
    if train.manifest.params["random_flip"]:
        for name, some in sets.items():
            views[name].append(features.extract([ImageOps.mirror(image) for image in some], size, processes))
    neighbors = nearest_neighbors(views, _features_of(train, dataset, features, size, processes))
    shares, threshold = near_copies(label, neighbors)
    for name in images.drawn if threshold is not None else ():
        is_copy = (neighbors[name].ratios < threshold).astype(float)
        values.add(f"near_copy_share_{label}", name, is_copy, images.items, images.captions)
    trained = f"near_copy_share_{label}_trained"
    if shares and (fault := copied(shares[trained], shares[f"{trained}_ci_low"])):
        print(f"WARNING: {fault}", file=sys.stderr)
    return Comparison(numbers | shares, features.name, neighbors["trained"], threshold)


def _features_of(
    shards: LatentShards, dataset: Path, features: ImageFeatures, batch_size: int, processes: Processes
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and features of all images of a split, batch by batch; each process decodes its own batches only."""
    rows, last = read_dataset(dataset, shards.split), -1

    def compute(number: int) -> tuple[list[str], np.ndarray]:
        nonlocal last
        while last < number:  # batches come in rising order
            batch, last = list(islice(rows, batch_size)), last + 1
        return [row["id"] for row in batch], features.extract_batch([cropped(row, shards.manifest) for row in batch])

    return processes.map(compute, range(-(-len(shards) // batch_size)))

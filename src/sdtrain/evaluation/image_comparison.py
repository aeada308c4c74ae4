"""Drawn images seen through an image encoder: beside real ones, with their captions, and beside training images."""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from sdtrain.data.shards import LatentShards
from sdtrain.evaluation.clip_score import load_caption_features
from sdtrain.evaluation.drawn_images import DrawnImages, cropped_images
from sdtrain.evaluation.features import ImageFeatures, load_features
from sdtrain.evaluation.image_sets import caption_metrics, image_set_metrics
from sdtrain.evaluation.neighbors import NEAR_SHARE, near_copies, nearest_neighbors
from sdtrain.evaluation.pictures import write_neighbors
from sdtrain.ground.manifests import FeaturesManifest
from sdtrain.ground.values import Values
from sdtrain.models.parts import pick_device
from sdtrain.params.schema import EvaluateParams

_COPIED_SHARE = 2 * NEAR_SHARE
"""Told if surely more of the trained model's images than this are near copies."""


def compare_images(
    params: EvaluateParams,
    seed: int,
    encoder: Path,
    images: DrawnImages,
    train: LatentShards,
    dataset: Path,
    values: Values,
    out: Path,
) -> dict[str, float]:
    """Set metrics, CLIPScore where the encoder is a CLIP, and the share of near copies; a model that copies is told.

    The images' own CLIPScores are added to `values`, the nearest neighbours written to `out`.

    Args:
        encoder: the folder `data/features`.
        dataset: the folder `data/dataset`.
    """
    label = FeaturesManifest.read(encoder).label
    if label is None:
        write_neighbors(out, None, images, None, None, train, dataset)
        return {}
    features, size = load_features(encoder, label, pick_device()), params.batch_size
    found = {name: features.extract(some, size) for name, some in {"real": images.real, **images.drawn}.items()}
    drawn = {name: found[name] for name in images.drawn}
    numbers = {"num_drawn_images": len(images.items)} | image_set_metrics(seed, label, found["real"], drawn)
    if features.has_captions:
        texts = load_caption_features(encoder, pick_device()).extract(images.captions, size)
        of_images = images.items, images.captions, texts
        numbers |= caption_metrics(seed, params.num_bootstrap, label, *of_images, found, values)
    nearest = threshold = None
    if params.nearest_neighbors:
        neighbors = nearest_neighbors(found, _features_of(train, dataset, features, size))
        shares, threshold = near_copies(label, neighbors)
        numbers |= shares
        nearest = neighbors["trained"]
        if shares and shares[f"near_copy_share_{label}_trained_ci_low"] > _COPIED_SHARE:
            share = shares[f"near_copy_share_{label}_trained"]
            print(
                f"WARNING: the model copies: {100 * share:.0f} % of what it draws is nearer to a training image than "
                f"{100 * (1 - NEAR_SHARE):.0f} % of held-out images are; look at {out.name}'s neighbors, train for "
                "fewer steps, or on more images",
                file=sys.stderr,
            )
    write_neighbors(out, features.name, images, nearest, threshold, train, dataset)
    return numbers


def _features_of(
    shards: LatentShards, dataset: Path, features: ImageFeatures, batch_size: int
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Of all images of a split, batch by batch."""
    images = cropped_images(shards, dataset)
    while batch := list(islice(images, batch_size)):
        yield [item for item, _ in batch], features.extract([image for _, image in batch], batch_size)

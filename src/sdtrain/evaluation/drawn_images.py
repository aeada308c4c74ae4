"""What models draw to be measured, beside real images of the same captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from sdtrain.data.images import crop_image, decode_rgb, draw_crop
from sdtrain.data.shards import LatentShards, held_out_pictures, read_dataset
from sdtrain.ground.manifests import LatentsManifest
from sdtrain.ground.processes import ALONE, Processes
from sdtrain.models.pipelines import generate, seen_by
from sdtrain.params.schema import EvaluateParams


@dataclass
class DrawnImages:
    """Images of several models under the same captions and noise, in one order; RGB."""

    items: list[str] = field(default_factory=list)
    """As in `ground/values.py`."""
    captions: list[str] = field(default_factory=list)
    real: list[Image.Image] = field(default_factory=list)
    """One of each caption, which no model was trained on."""
    drawn: dict[str, list[Image.Image]] = field(default_factory=dict)
    """By model."""

    def add(
        self,
        items: Sequence[str],
        captions: Sequence[str],
        real: Sequence[Image.Image],
        drawn: dict[str, list[Image.Image]],
    ) -> None:
        """Add as many of each."""
        assert all(len(images) == len(items) for images in (captions, real, *drawn.values())), "one of each"
        self.items += items
        self.captions += captions
        self.real += real
        for model, images in drawn.items():
            self.drawn.setdefault(model, []).extend(images)


def draw_held_out(
    params: EvaluateParams,
    seed: int,
    pipelines: dict[str, DiffusionPipeline],
    shards: LatentShards,
    dataset: Path,
    images: DrawnImages,
    processes: Processes = ALONE,
) -> None:
    """Add what the models draw under held-out captions and conditions, an image for each, and the held-out images.

    Args:
        shards: of the held-out split.
        dataset: the folder `data/dataset`.
    """
    rows = shards.chosen(params.num_prompts)
    ids = shards.ids
    items = [ids[row] for row in rows]
    real = dict(cropped_images(shards, dataset, set(items)))
    names = [name for name in shards.manifest.conditions if name in seen_by(pipelines["trained"])]
    captions, conditions = held_out_pictures(shards, names, params.num_prompts)
    drawn = {
        model: generate(
            pipeline,
            captions,
            [seed + number for number in range(len(items))],
            conditions={name: given for name, given in conditions.items() if name in seen_by(pipeline)},
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
            batch_size=params.batch_size,
            processes=processes,
        )
        for model, pipeline in pipelines.items()
    }
    images.add(items, captions, [real[item] for item in items], drawn)


def cropped_images(
    shards: LatentShards, dataset: Path, ids: set[str] | None = None
) -> Iterator[tuple[str, Image.Image]]:
    """The images of a split as they were cropped for the cache: pairs of id and RGB image.

    Args:
        dataset: the folder `data/dataset`.
        ids: those wanted; None is all.
    """
    for row in read_dataset(dataset, shards.split):
        if ids is None or row["id"] in ids:
            yield row["id"], cropped(row, shards.manifest)


def cropped(row: dict, latents: LatentsManifest) -> Image.Image:
    """The image of a data set's row, RGB, as it was cropped for the cache."""
    image, params = decode_rgb(row["image"]), latents.params
    crop = draw_crop(image.size, params["resolution"], params["center_crop"], latents.seed, row["id"])
    return crop_image(image, crop)

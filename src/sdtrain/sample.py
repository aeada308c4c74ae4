"""The grid: base next to trained, with the same prompts and seeds, captions under the images."""

import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sdtrain.data import lit_scenes
from sdtrain.data.shards import LatentShards, held_out_pictures
from sdtrain.evaluation.relighting import lit_questions, relight
from sdtrain.ground.files import new_folder
from sdtrain.ground.light import linear_to_srgb
from sdtrain.ground.manifests import DatasetManifest, encoders_fingerprint
from sdtrain.models.pipelines import Conditions, drawn_px, generate, seen_by
from sdtrain.models.trained import load_base_pipeline, load_model
from sdtrain.params.schema import SampleParams

_MIN_CELL_PX = 128
_MARGIN_PX = 8
_LIGHTS = ("left", "right", "top", "bottom")

Columns = dict[str, list[list[Image.Image]]]
"""The grid's images, [name][row][image]."""


def sample_grid(
    params: SampleParams, seed: int, base: Path, dataset: Path, latents: Path, model: Path, out: Path
) -> None:
    """Draw `out/grid.png`: a row per prompt, the base's images left and the trained model's right.

    With `num_held_out`, a row per held-out image: its conditions, which the trained model sees, stand left of both. Of
    the lit world, a row per scene under four lights, the trained model's image beside the truth. The PNG file's text
    `captions` lists the rows' captions as JSON.
    """
    pipelines = {"base": load_base_pipeline(base), "trained": load_model(model, base)}
    data = DatasetManifest.read(dataset)
    if params.num_held_out is None:
        captions = params.prompts
        columns = {name: _draw(params, seed, pipeline, captions, {}) for name, pipeline in pipelines.items()}
    elif data.is_lit:
        captions, columns = _relit(params, seed, pipelines, by_map=data.world == "lit_by_map")
    else:
        shards = LatentShards(latents, "validation", encoders_fingerprint(base))
        captions, columns = _held_out(params, seed, pipelines, shards)
    text = PngInfo()
    text.add_text("captions", json.dumps(captions))
    with new_folder(out) as folder:
        draw_grid(columns, captions).save(folder / "grid.png", pnginfo=text)


def _held_out(
    params: SampleParams, seed: int, pipelines: dict[str, DiffusionPipeline], shards: LatentShards
) -> tuple[list[str], Columns]:
    """Held-out captions; their conditions, of a relit object the held-out image itself, and what the models draw."""
    trained = pipelines["trained"]
    seen = [name for name in shards.manifest.conditions if name in seen_by(trained)]
    captions, conditions = held_out_pictures(shards, [*seen, "mean"], params.num_held_out)
    truths = conditions.pop("mean")
    shown = {**conditions, **({"held out": truths} if "foreground" in seen else {})}
    columns = {name: [[_shown(name, value, trained)] for value in values] for name, values in shown.items()}
    for name, pipeline in pipelines.items():
        takes = {key: values for key, values in conditions.items() if key in seen_by(pipeline)}
        columns[name] = _draw(params, seed, pipeline, captions, takes)
    return captions, columns


def _relit(
    params: SampleParams, seed: int, pipelines: dict[str, DiffusionPipeline], by_map: bool
) -> tuple[list[str], Columns]:
    """Scenes of the lit world that are in no data set."""
    questions = lit_questions(seed, params.num_held_out)
    columns = {"foreground": [[question.foreground] for question in questions]}
    draw = partial(
        relight,
        by_map=by_map,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        batch_size=params.batch_size,
        negative_prompt=params.negative_prompt,
    )
    first = [replace(question, light_name=_LIGHTS[0]) for question in questions]
    columns[f"base, {_LIGHTS[0]} light"] = [[image] for image in draw(pipelines["base"], first)]
    for name in _LIGHTS:
        asked = [replace(question, light_name=name) for question in questions]
        pairs = zip(asked, draw(pipelines["trained"], asked), strict=True)
        columns[f"{name} light: truth, trained"] = [[question.truth, image] for question, image in pairs]
    return [lit_scenes.caption(question.example.lit, None) for question in questions], columns


def _shown(name: str, value: Image.Image | Tensor, pipeline: DiffusionPipeline) -> Image.Image:
    """A condition as an image: latents decoded; of a light map the part that a screen can show."""
    if isinstance(value, Image.Image):
        return value
    if name == "light":
        visible = Image.fromarray((255 * linear_to_srgb(value.numpy().clip(0, 1))).round().astype(np.uint8))
        return visible.resize((drawn_px(pipeline),) * 2, Image.Resampling.NEAREST)
    with torch.inference_mode():
        decoded = pipeline.vae.decode(value[None].to(pipeline.device)).sample.cpu()
    return pipeline.image_processor.postprocess(decoded, output_type="pil")[0]


def draw_grid(columns: Columns, captions: list[str]) -> Image.Image:
    """Lay out images: a headed column per name, a row per caption, [name][row][image]."""
    nums = {name: len(rows[0]) for name, rows in columns.items()}
    first = next(iter(columns.values()))[0][0]
    cell = first.width * max(1, -(-_MIN_CELL_PX // first.width))
    font = ImageFont.load_default(size=max(14, cell // 10))
    line = int(font.size * 1.4)
    widths = {name: num * (cell + _MARGIN_PX) + 2 * _MARGIN_PX for name, num in nums.items()}
    lefts = dict(zip(widths, itertools.accumulate(widths.values(), initial=0), strict=False))
    width = sum(widths.values())
    texts = [_wrap(caption, font, width - 2 * _MARGIN_PX) for caption in captions]
    row_heights = [cell + 2 * _MARGIN_PX + line * len(lines) for lines in texts]
    grid = Image.new("RGB", (width, line + 2 * _MARGIN_PX + sum(row_heights)), "white")
    draw = ImageDraw.Draw(grid)
    for name, left in lefts.items():
        draw.text((left + _MARGIN_PX, _MARGIN_PX), name, fill="black", font=font)
    top = line + 2 * _MARGIN_PX
    for row, (lines, height) in enumerate(zip(texts, row_heights, strict=True)):
        for name, images in columns.items():
            for place, image in enumerate(images[row]):
                left = lefts[name] + _MARGIN_PX + place * (cell + _MARGIN_PX)
                grid.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (left, top))
        for number, text in enumerate(lines):
            draw.text((_MARGIN_PX, top + cell + 2 + number * line), text, fill="black", font=font)
        top += height
    return grid


def _draw(
    params: SampleParams, seed: int, pipeline: DiffusionPipeline, prompts: list[str], conditions: Conditions
) -> list[list[Image.Image]]:
    """Images [prompt][image]."""
    num = params.images_per_prompt
    images = generate(
        pipeline,
        [prompt for prompt in prompts for _ in range(num)],
        [seed + place for _ in prompts for place in range(num)],
        conditions={name: [image for image in given for _ in range(num)] for name, given in conditions.items()},
        negative_prompt=params.negative_prompt,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        batch_size=params.batch_size,
    )
    return [images[row * num : (row + 1) * num] for row in range(len(prompts))]


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text at spaces into lines of at most `width` px; longer words stay whole."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines

"""The grid: base next to trained, with the same prompts and seeds, captions under the images."""

import itertools
import json
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sdtrain.data.shards import LatentShards, held_out_pictures
from sdtrain.ground.files import new_folder
from sdtrain.ground.manifests import encoders_fingerprint
from sdtrain.models.pipelines import Conditions, generate, load_pipeline
from sdtrain.models.trained import load_model
from sdtrain.params.schema import SampleParams

_MIN_CELL_PX = 128
_MARGIN_PX = 8


def sample_grid(params: SampleParams, seed: int, base: Path, latents: Path, model: Path, out: Path) -> None:
    """Draw `out/grid.png`: a row per prompt, the base's images left and the trained model's right.

    With `num_held_out`, a row per held-out image: its conditions, which the trained model sees, stand left of both. The
    PNG file's text `captions` lists the rows' captions as JSON.
    """
    prompts, conditions = params.prompts, {}
    if params.num_held_out is not None:
        shards = LatentShards(latents, "validation", encoders_fingerprint(base))
        prompts, conditions = held_out_pictures(shards, tuple(shards.manifest.conditions), params.num_held_out)
    columns = {name: [[image] for image in images] for name, images in conditions.items()}
    for name, pipeline in (("base", load_pipeline(base)), ("trained", load_model(model, base))):
        columns[name] = _draw(params, seed, pipeline, prompts, conditions if name == "trained" else {})
    text = PngInfo()
    text.add_text("captions", json.dumps(prompts))
    with new_folder(out) as folder:
        draw_grid(columns, prompts).save(folder / "grid.png", pnginfo=text)


def draw_grid(columns: dict[str, list[list[Image.Image]]], captions: list[str]) -> Image.Image:
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

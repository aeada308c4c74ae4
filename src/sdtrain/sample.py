"""The grid: base next to trained, with the same prompts and seeds, captions under the images."""

from pathlib import Path

from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from sdtrain.ground.files import new_folder
from sdtrain.models.pipelines import generate, load_pipeline
from sdtrain.models.trained import load_model
from sdtrain.params.schema import SampleParams

_MIN_CELL_PX = 128
_MARGIN_PX = 8


def sample_grid(params: SampleParams, seed: int, base: Path, model: Path, out: Path) -> None:
    """Draw `out/grid.png`: a row per prompt, the base's images left and the trained model's right."""
    pipelines = {"base": load_pipeline(base), "trained": load_model(model, base)}
    columns = {name: _draw(params, seed, pipeline) for name, pipeline in pipelines.items()}
    with new_folder(out) as folder:
        draw_grid(columns, params.prompts).save(folder / "grid.png")


def draw_grid(columns: dict[str, list[list[Image.Image]]], captions: list[str]) -> Image.Image:
    """Lay out images: a headed column per name, a row per caption, [name][row][image]."""
    num = len(next(iter(columns.values()))[0])
    scale = max(1, -(-_MIN_CELL_PX // next(iter(columns.values()))[0][0].width))
    cell = next(iter(columns.values()))[0][0].width * scale
    font = ImageFont.load_default(size=max(14, cell // 10))
    line = int(font.size * 1.4)
    column_width = num * (cell + _MARGIN_PX) + 2 * _MARGIN_PX
    width = len(columns) * column_width
    texts = [_wrap(caption, font, width - 2 * _MARGIN_PX) for caption in captions]
    row_heights = [cell + 2 * _MARGIN_PX + line * len(lines) for lines in texts]
    grid = Image.new("RGB", (width, line + 2 * _MARGIN_PX + sum(row_heights)), "white")
    draw = ImageDraw.Draw(grid)
    for number, name in enumerate(columns):
        draw.text((number * column_width + _MARGIN_PX, _MARGIN_PX), name, fill="black", font=font)
    top = line + 2 * _MARGIN_PX
    for row, (lines, height) in enumerate(zip(texts, row_heights, strict=True)):
        for number, images in enumerate(columns.values()):
            for place, image in enumerate(images[row]):
                left = number * column_width + _MARGIN_PX + place * (cell + _MARGIN_PX)
                grid.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (left, top))
        for number, text in enumerate(lines):
            draw.text((_MARGIN_PX, top + cell + 2 + number * line), text, fill="black", font=font)
        top += height
    return grid


def _draw(params: SampleParams, seed: int, pipeline: StableDiffusionPipeline) -> list[list[Image.Image]]:
    """Images [prompt][image]."""
    num = params.images_per_prompt
    images = generate(
        pipeline,
        [prompt for prompt in params.prompts for _ in range(num)],
        [seed + place for _ in params.prompts for place in range(num)],
        negative_prompt=params.negative_prompt,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        batch_size=params.batch_size,
    )
    return [images[row * num : (row + 1) * num] for row in range(len(params.prompts))]


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

"""Images laid out in one, with names above and captions below."""

import itertools

from PIL import Image, ImageDraw, ImageFont

MIN_CELL_PX = 128
"""Smaller images are enlarged, each pixel to a square, to at least this side."""
_MARGIN_PX = 8

Columns = dict[str, list[list[Image.Image]]]
"""A grid's images, [name][row][image]."""


def draw_grid(columns: Columns, captions: list[str]) -> Image.Image:
    """Lay out images: a headed column per name, a row per caption, [name][row][image]."""
    nums = {name: len(rows[0]) for name, rows in columns.items()}
    first = next(iter(columns.values()))[0][0]
    cell = first.width * max(1, -(-MIN_CELL_PX // first.width))
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

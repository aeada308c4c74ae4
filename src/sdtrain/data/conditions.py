"""Images that belong to an image: from any file to clean pixels, and under their image's own crop."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sdtrain.data.images import BadImage, clean_image, crop_of
from sdtrain.ground.errors import InputError

_BEHIND = "#000000"
"""Colour behind transparent parts of a hint: where it says nothing."""


@dataclass(frozen=True)
class Condition:
    """One checked condition of an image."""

    data: bytes
    """A PNG of one channel if it is grey, else an RGB image's file."""
    is_grey: bool
    pixels_sha256: str
    note: str
    """What was odd about the file; usually empty."""


def clean_condition(source: bytes | str, size: tuple[int, int]) -> Condition:
    """Decode a condition completely.

    Args:
        source: the file's bytes, or its path.
        size: of its image, (width, height) in px.

    Raises:
        BadImage: as `clean_image`; or it has another aspect ratio than its image.
        MemoryError: the machine's fault.
    """
    data, image, note = clean_image(source, _BEHIND)
    scale = image.width / size[0]
    if abs(image.height - size[1] * scale) > max(1, scale):  # a pixel of the smaller one
        raise BadImage(f"size differs: {image.width}x{image.height}, image {size[0]}x{size[1]}")
    pixels = np.asarray(image)
    is_grey = bool((pixels == pixels[..., :1]).all())
    if is_grey:
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0]).save(buffer, format="PNG")
        data = buffer.getvalue()
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    return Condition(data, is_grey, digest, note)


def condition_pixels(row: dict, name: str, channels: int, resolution: int, center_crop: bool, seed: int) -> np.ndarray:
    """A condition of a row of `data/dataset` under its image's own resize and crop, uint8 [channels, R, R].

    Resized by area (a box filter), which neither rings around edges nor shifts them.
    """
    size, box = crop_of((row["width"], row["height"]), resolution, center_crop, seed, row["id"])
    with Image.open(io.BytesIO(row[name])) as opened:
        image = opened.convert("RGB" if channels == 3 else "L").resize(size, Image.Resampling.BOX)
    return np.asarray(image.crop(box)).reshape(resolution, resolution, channels).transpose(2, 0, 1)


def read_hint(path: Path, side: int) -> Image.Image:
    """A hint from a file, RGB, its center cropped to a square of `side` px.

    Raises:
        InputError: the file can't be used.
    """
    try:
        _, image, _ = clean_image(str(path), _BEHIND)
    except BadImage as fault:
        raise InputError(f"{path}: {fault}") from None
    size, box = crop_of(image.size, side, center_crop=True, seed=0, sample_id="")
    return image.resize(size, Image.Resampling.BOX).crop(box)

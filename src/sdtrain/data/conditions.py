"""Conditions: what belongs to an image besides its caption, by name, cleaned with it and cropped with it.

`CONDITIONS` has an entry for each name: how the data gate makes a file fit to store, and how the cache
gets its values for the image's square of pixels.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sdtrain.data.images import BadImage, Crop, clean_image, draw_crop
from sdtrain.ground.errors import InputError


@dataclass(frozen=True)
class Cleaned:
    """A condition of one image, as the gate stores it."""

    data: bytes
    sha256: str
    """Of its values and shape, however they are stored."""
    channels: int
    note: str
    """On what was odd about the file, usually empty."""


@dataclass(frozen=True)
class Condition:
    """How one kind of condition is read."""

    clean: Callable[[bytes | str, tuple[int, int]], Cleaned]
    """From a file's bytes or path and the image's (width, height); raises BadImage with the reason for dropping."""
    crop: Callable[[bytes, Crop, int], np.ndarray]
    """From the stored bytes, the image's crop and the number of channels to an array [channels, R, R]."""


def _clean_hint(source: bytes | str, size: tuple[int, int]) -> Cleaned:
    """An opaque image on black, whose aspect ratio is the image's."""
    data, hint, note = clean_image(source, "#000000", keep_grey=True)
    if not _fits(hint.size, size):
        raise BadImage(f"size differs: {hint.width}x{hint.height}, image {size[0]}x{size[1]}")
    values = np.asarray(hint)
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    sha256 = hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).hexdigest()
    return Cleaned(data, sha256, 1 if values.ndim == 2 else 3, note)


def _fits(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have one aspect ratio, within a pixel at the smaller size."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(*size, *other)


def _crop_hint(data: bytes, crop: Crop, channels: int) -> np.ndarray:
    """uint8. Resized by area, which doesn't ring: what is black and white beside edges stays so."""
    hint = Image.open(io.BytesIO(data))
    if hint.size != (crop.width, crop.height):
        hint = hint.resize((crop.width, crop.height), Image.Resampling.BOX)
    square = np.asarray(hint.crop(crop.box).convert("L" if channels == 1 else "RGB"))
    return np.ascontiguousarray(square.reshape(crop.side, crop.side, channels).transpose(2, 0, 1))


CONDITIONS = {"hint": Condition(_clean_hint, _crop_hint)}


def read_condition(name: str, path: Path, side: int) -> Image.Image:
    """A condition from a file as a model draws under it, RGB: its center cropped to a square of `side` px.

    Raises:
        InputError: the file can't be used.
    """
    try:
        _, image, _ = clean_image(str(path), "#000000")
        cleaned = CONDITIONS[name].clean(str(path), image.size)
    except BadImage as fault:
        raise InputError(f"{path}: {fault}") from None
    crop = draw_crop(image.size, side, center_crop=True, seed=0, sample_id="")
    return Image.fromarray(CONDITIONS[name].crop(cleaned.data, crop, 3).transpose(1, 2, 0))

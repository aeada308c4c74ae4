"""Conditions: what belongs to an image besides its caption, by name, cleaned with it and cropped with it.

`CONDITIONS` has an entry for each name: of which kind it is, how the data gate makes a file fit to store, and how
the stored bytes become an array for the image's square. By kind the cache then has

- `pixels`: the square as it is (a ControlNet's hint);
- `latents`: the VAE's encoding of the square, of a foreground after `on_grey`;
- `mask`: `area_mean`, the share of each latent's pixels that is the object's;
- `light`: the map. It isn't cropped: a crop changes what is seen of a scene, not the light that falls on it.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
from PIL import Image

from sdtrain.data.images import BadImage, Crop, clean_image, crop_image, draw_crop, read_bytes, short_cause
from sdtrain.ground.errors import InputError
from sdtrain.ground.light import MAP_PX

if TYPE_CHECKING:
    from torch import Tensor

_BLACK, _GREY = "#000000", 127
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_LIT = 128
"""The least that the lightest pixel of a mask must have, of 255: a file of zeros and ones isn't one."""
_ROUNDING = 0.01
"""By how much a part of a light may exceed the light, in shares of its largest value: .hdr files have 8 bits."""


@dataclass(frozen=True)
class Cleaned:
    """A condition of one image, as the gate stores it."""

    data: bytes
    sha256: str
    """Of its values and shape, however they are stored."""
    channels: int
    note: str = ""
    """On what was odd about the file, usually empty."""
    map_shape: tuple[int, int, int] | None = None
    """Of a light map: height, width and channels."""


@dataclass(frozen=True)
class Condition:
    """How one kind of condition is read."""

    kind: Literal["pixels", "latents", "mask", "light"]
    clean: Callable[[bytes | str | list, tuple[int, int]], Cleaned]
    """From a file's bytes or path, for a light also from nested lists, and the image's (width, height); raises BadImage
    with the reason for dropping."""
    crop: Callable[[bytes, Crop, int], np.ndarray]
    """From the stored bytes, the image's crop and the number of channels to uint8 [channels, R, R]; to float32
    [H, W, 3] for a light."""
    blank: float = 0
    """The value which one that says nothing has everywhere: of latents in the pixels that the VAE gets."""


def _decode(source: bytes | str, size: tuple[int, int], **keep: bool) -> tuple[bytes, Image.Image, str]:
    """A clean image on black, whose aspect ratio is the image's."""
    data, image, note = clean_image(source, _BLACK, **keep)
    if not _fits(image.size, size):
        raise BadImage(f"size differs: {image.width}x{image.height}, image {size[0]}x{size[1]}")
    return data, image, note


def _fits(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have one aspect ratio, within a pixel at the smaller size."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(*size, *other)


def _cleaned(data: bytes, values: np.ndarray, note: str) -> Cleaned:
    return Cleaned(data, _sha256(values), 1 if values.ndim == 2 else values.shape[2], note)


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).hexdigest()


def _clean_hint(source: bytes | str, size: tuple[int, int]) -> Cleaned:
    """Opaque; grey where it has no colours."""
    data, hint, note = _decode(source, size, keep_grey=True)
    values = np.asarray(hint)
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    return _cleaned(data, values, note)


def _clean_picture(source: bytes | str, size: tuple[int, int]) -> Cleaned:
    """RGB, opaque."""
    data, image, note = _decode(source, size)
    return _cleaned(data, np.asarray(image), note)


def _clean_foreground(source: bytes | str, size: tuple[int, int]) -> Cleaned:
    """RGB, or RGBA where a part is transparent: its alpha tells what is the object."""
    data, image, note = _decode(source, size, keep_alpha=True)
    values = np.asarray(image)
    if image.mode == "RGBA":
        most = values[..., 3].max()
        if most < _LIT:
            raise BadImage(f"is transparent: its most opaque pixel has {most} of 255")
        if values[..., 3].min() == 255:
            values = values[..., :3]
    return _cleaned(data, values, note)


def _clean_mask(source: bytes | str, size: tuple[int, int]) -> Cleaned:
    """Grey, white where the object is. Colours are turned to grey; behind transparent parts it is black."""
    data, image, note = _decode(source, size, keep_grey=True)
    if image.mode != "L":
        image, buffer = image.convert("L"), io.BytesIO()
        image.save(buffer, format="PNG")
        data = buffer.getvalue()
    values = np.asarray(image)
    if values.max() < _LIT:
        raise BadImage(f"is empty: its lightest pixel has {values.max()} of 255")
    return _cleaned(data, values, note)


def _clean_light(source: bytes | str | list, size: tuple[int, int]) -> Cleaned:
    """A .npy file of float32 [H, W, 3], from linear values that are never clipped; at most `MAP_PX` squared."""
    values = _map_values(source)
    if values.ndim != 3 or values.shape[2] != 3 or not values.size:
        raise BadImage(f"has another shape: {'x'.join(map(str, values.shape))}, expected height x width x 3")
    if values.min() < 0:
        raise BadImage(f"is negative: {values.min():g}")
    if min(values.shape[:2]) >= MAP_PX:
        values = cv2.resize(values, (MAP_PX, MAP_PX), interpolation=cv2.INTER_AREA)
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise BadImage("isn't finite")
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return Cleaned(buffer.getvalue(), _sha256(values), 3, map_shape=values.shape)


def _map_values(source: bytes | str | list) -> np.ndarray:
    """float64, of a shape still to be checked. EXPOSURE in an .hdr file's header isn't applied."""
    if isinstance(source, list):
        try:
            return np.array(source, dtype=np.float64)
        except (TypeError, ValueError):
            raise BadImage("isn't numbers in rows and columns") from None
    data = read_bytes(source)
    try:
        if data.startswith(b"\x93NUMPY"):
            values = np.load(io.BytesIO(data), allow_pickle=False)
        elif data.startswith(b"#?"):
            values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        else:
            raise BadImage("can't be decoded: neither a .npy nor a Radiance .hdr file")
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # as for images, a damaged file may raise anything
        raise BadImage(f"can't be decoded: {short_cause(error)}") from None
    if values is None:
        raise BadImage("can't be decoded: a damaged .hdr file")
    if values.dtype.kind != "f":
        raise BadImage(f"isn't floats: {values.dtype}")
    return values.astype(np.float64) if data.startswith(b"\x93NUMPY") else values[..., ::-1].astype(np.float64)


def check_light_part(light: bytes, part: bytes) -> None:
    """Check that a part L1 of a light L leaves a light L - L1, both as stored; rounding may make that a bit negative.

    Raises:
        BadImage: another shape than the light's, or more than the light.
    """
    whole, part = _read_map(light), _read_map(part)
    if part.shape != whole.shape:
        sizes = ["x".join(map(str, values.shape)) for values in (part, whole)]
        raise BadImage(f"shape differs: {sizes[0]}, light {sizes[1]}")
    excess = (part - whole).max()
    if excess > _ROUNDING * whole.max():
        raise BadImage(f"exceeds light: by {excess:g}")


def _read_map(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _crop(data: bytes, crop: Crop, channels: int, resample: Image.Resampling = Image.Resampling.BOX) -> np.ndarray:
    """Resized by area, which doesn't ring: what is black and white beside edges stays so, and what is grey.

    Colours are weighted by alpha, so those of transparent parts don't bleed.
    """
    square = crop_image(Image.open(io.BytesIO(data)), crop, resample).convert(_MODES[channels])
    values = np.asarray(square).reshape(crop.side, crop.side, channels)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _keep_map(data: bytes, crop: Crop, channels: int) -> np.ndarray:
    return _read_map(data)


_PICTURE = Condition("latents", _clean_picture, partial(_crop, resample=Image.Resampling.LANCZOS), blank=-1)
_LIGHT = Condition("light", _clean_light, _keep_map)
CONDITIONS = {
    "hint": Condition("pixels", _clean_hint, _crop),
    "foreground": Condition("latents", _clean_foreground, _crop),
    "background": _PICTURE,
    "mask": Condition("mask", _clean_mask, _crop),
    "light": _LIGHT,
    "light_1": _LIGHT,
    "relit_1": _PICTURE,
    "relit_2": _PICTURE,
}


def on_grey(foreground: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """A foreground as the VAE gets it, float32 [3, R, R]: 127 + (x - 127)·M, /127 - 1, as IC-Light has it.

    So grey is exactly 0, and white 128/127.

    Args:
        foreground: uint8 [3 or 4, R, R].
        mask: M, uint8 [1, R, R] of 255, where the foreground's alpha isn't less; without, M is the alpha, or 1.
    """
    if len(foreground) == 4:
        mask = foreground[3:] if mask is None else np.minimum(mask, foreground[3:])
    pixels = foreground[:3].astype(np.float32) - _GREY
    return (pixels if mask is None else pixels * (mask.astype(np.float32) / 255)) / _GREY


def area_mean(mask: np.ndarray, factor: int) -> np.ndarray:
    """From uint8 [1, R, R] to the mean of each square of factor x factor pixels, float32 [1, R/factor, R/factor]."""
    side = mask.shape[-1] // factor
    return mask.reshape(1, side, factor, side, factor).mean(axis=(2, 4), dtype=np.float32) / 255


def read_condition(name: str, path: Path, side: int) -> "Image.Image | Tensor":
    """A condition from a file as a model draws under it: its center cropped to a square of `side` px, in RGB.

    A foreground with alpha is put on grey, one without is taken as it is. A light is float32 [H, W, 3], at most
    `MAP_PX` squared.

    Raises:
        InputError: the file can't be used.
    """
    condition = CONDITIONS[name]
    try:
        if condition.kind == "light":
            import torch

            return torch.from_numpy(_read_map(condition.clean(str(path), (side, side)).data))
        _, image, _ = clean_image(str(path), _BLACK)
        cleaned = condition.clean(str(path), image.size)
    except BadImage as fault:
        raise InputError(f"{path}: {fault}") from None
    crop = draw_crop(image.size, side, center_crop=True, seed=0, sample_id="")
    square = condition.crop(cleaned.data, crop, max(3, cleaned.channels))
    if len(square) == 4:
        square = (on_grey(square) * _GREY + _GREY).round().astype(np.uint8)
    return Image.fromarray(square.transpose(1, 2, 0))

"""Pictures: from any file to clean RGB, and from RGB to the VAE's square of pixels."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sdtrain import randomness


class BadPicture(Exception):
    """The file can't be used; the message says why, in a few words."""


def clean_picture(source: bytes | str, background: str) -> tuple[bytes, Image.Image]:
    """Decode a picture wholly and make it plain RGB, upright and opaque.

    Args:
        source: the file's bytes, or its path.
        background: colour behind transparent parts, `#rrggbb`.

    Returns:
        The bytes to store and the decoded picture. The original bytes are kept where the file is
        RGB, upright and opaque already; else they are those of a PNG of the cleaned picture.

    Raises:
        BadPicture: missing, truncated, not a picture, or too large to decode safely.
    """
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
    except FileNotFoundError:
        raise BadPicture("file is missing") from None
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise BadPicture(f"can't be decoded: {error}".split("\n")[0].split(" <_io")[0]) from None
    if upright.mode == "RGB" and opened.getexif().get(0x0112, 1) == 1 and "transparency" not in upright.info:
        return data, upright
    picture = _flatten(upright, background)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue(), picture


def _flatten(picture: Image.Image, background: str) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":  # 16-bit greys: PIL would clip, not scale
        values = np.asarray(picture, dtype=np.float32)
        scale = 255 / 65535 if values.max() > 255 else 1
        picture = Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")
    return picture.convert("RGB")


def decode_rgb(data: bytes) -> Image.Image:
    """Decode bytes that `clean_picture` gave."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def square_pixels(picture: Image.Image, resolution: int, center_crop: bool, seed: int, sample_id: str) -> np.ndarray:
    """Resize the shorter side to `resolution` (Lanczos), crop, and scale: float32 [3, R, R] in -1..1.

    Without `center_crop` the crop's place is drawn from (seed, sample id).
    """
    scale = resolution / min(picture.size)
    width, height = (max(resolution, round(side * scale)) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    if center_crop:
        left, top = (width - resolution) // 2, (height - resolution) // 2
    else:
        rng = randomness.generator(seed, "crop", randomness.hash64(sample_id))
        left, top = rng.integers(0, [width - resolution + 1, height - resolution + 1]).tolist()
    square = np.asarray(picture.crop((left, top, left + resolution, top + resolution)), dtype=np.float32)
    return square.transpose(2, 0, 1) / 127.5 - 1

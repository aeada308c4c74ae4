"""Images: from any file to clean RGB, and from RGB to the VAE's square of pixels."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from sdtrain.ground import randomness

DAMAGED_EXIF = "EXIF is damaged"
"""Start of the note on an image that is kept although its EXIF can't be read or written back."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the transpose that makes the image upright; 1 is upright already."""
_WIDE_GREYS = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_GREYS = ("1", "L", "LA", *_WIDE_GREYS)
_SCALED_TO_16_BITS = ("PNG", "JPEG2000", "PPM")
"""Formats whose greys of more than 8 bits Pillow scales to 0..65535, whatever the file's bit depth."""


class BadImage(Exception):
    """The file can't be used; the message says why, in a few words."""


def clean_image(
    source: bytes | str, background: str, keep_grey: bool = False, keep_alpha: bool = False
) -> tuple[bytes, Image.Image, str]:
    """Decode an image completely and make it plain RGB, upright and opaque.

    Args:
        source: the file's bytes, or its path.
        background: colour behind transparent parts, `#rrggbb`; a grey with `keep_grey`.
        keep_grey: leave the one channel (L) of a file that has no colours.
        keep_alpha: leave transparent parts as they are, in RGBA; there is no background then.

    Returns:
        The bytes to store, the decoded image, and a note on what was odd about it, usually empty. The
        original bytes are kept where the file is plain, upright and opaque already; else they are those
        of a PNG of the cleaned image.

    Raises:
        BadImage: missing, truncated, not an image, too large to decode safely, or grey of unknown range.
        MemoryError: the machine's fault, not the image's.
    """
    data = read_bytes(source)
    try:
        return _clean(data, background, keep_grey, keep_alpha)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise anything on a damaged file
        raise BadImage(f"can't be decoded: {short_cause(error)}") from None


def read_bytes(source: bytes | str) -> bytes:
    """A file's bytes, given them or its path.

    Raises:
        BadImage: missing, or can't be read.
    """
    try:
        return source if isinstance(source, bytes) else Path(source).read_bytes()
    except FileNotFoundError:
        raise BadImage("file is missing") from None
    except (OSError, ValueError) as error:
        raise BadImage(f"can't be read: {short_cause(error)}") from None


def _clean(data: bytes, background: str, keep_grey: bool, keep_alpha: bool) -> tuple[bytes, Image.Image, str]:
    opened, data = _open(data)
    with opened:
        opened.load()
        orientation, note = _orientation(opened)
        image = _eight_bits(opened)
        image = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image.copy()
        mode = "L" if keep_grey and opened.mode in _GREYS else "RGB"
        if keep_alpha and image.has_transparency_data:
            mode = "RGBA"
    if opened.mode == mode and orientation == 1 and "transparency" not in image.info:
        return data, image, note
    image = image.convert(mode) if mode == "RGBA" else _flatten(image, background, mode)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue(), image, note


def _open(data: bytes) -> tuple[Image.Image, bytes]:
    """Open a file; return it with the bytes from which it can be opened again.

    Pillow reads a JPEG's resolution from its EXIF, and refuses the file as no image where that is a text
    or a single byte. The EXIF is then hidden by changing one byte of its name, and passed on after opening.
    """
    try:
        return Image.open(io.BytesIO(data)), data
    except Exception:
        hidden = data.replace(b"Exif\0\0", b"Exif\0\1", 1)
        if hidden == data or not data.startswith(b"\xff\xd8"):
            raise
    opened = Image.open(io.BytesIO(hidden))
    for _, segment in opened.applist:
        if segment.startswith(b"Exif\0\1"):
            opened.info["exif"] = b"Exif\0\0" + segment[6:]
    return opened, hidden


def short_cause(error: Exception) -> str:
    """An error as one short line without object addresses, so that it is the same in every run."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = str(error).split("\n")[0].split(" <_io")[0].strip()
    return line[:60] or type(error).__name__


def _orientation(opened: Image.Image) -> tuple[int, str]:
    """The orientation left to apply, 1 where none can be read, and a note where the EXIF is damaged.

    Pillow's `exif_transpose` isn't used: it rewrites the EXIF, which fails on damaged tags. TIFFs are
    upright once loaded.
    """
    apart = Image.Image()  # parsed again: the plugin may have tried already, and an `Exif` raises only once
    apart.info.update(opened.info)
    orientation, note = 1, ""
    try:
        exif = apart.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        exif.tobytes()  # reads every tag
    except MemoryError:
        raise
    except Exception as error:  # as above, Pillow raises anything
        note = f"{DAMAGED_EXIF}: {short_cause(error)}"
    if orientation != 1 and orientation not in _TURNS:
        return 1, f"{DAMAGED_EXIF}: orientation {orientation!r:.20} isn't 1 to 8"
    return orientation, note


def _eight_bits(opened: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits or floats, scaled to 8 bits by the range that mode and file declare; others unchanged.

    The values in the image don't decide the range. Black and white are:
    - PNG, JPEG 2000 and PGM: 0 and 65535. Pillow itself scales a PGM's maxval and the depth of JPEG 2000 to that.
    - TIFF of unsigned integers: 0 and 2**BitsPerSample - 1, or the reverse where PhotometricInterpretation is
      WhiteIsZero, which Pillow applies up to 8 bits only. MaxSampleValue isn't read: by TIFF 6.0 it is a statistic.
    - TIFF and PFM of floats: 0 and 1, by convention; a value outside is an error.

    Pillow itself reduces 16-bit colours to 8 bits: to their upper bytes, or by maxval in a PPM.

    Raises:
        BadImage: floats outside 0..1, signed integers, or a format that doesn't declare its range.
    """
    tags = opened.tag_v2 if isinstance(opened, TiffImagePlugin.TiffImageFile) else {}
    signed = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2  # 8 bits open as L and would wrap around
    if opened.mode not in _WIDE_GREYS and not signed:
        return opened
    values = np.asarray(opened)
    if opened.mode == "F" and (tags or opened.info.get("scale") == 1):  # the scale of a PFM
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # in this form, NaN counts as outside too
            raise BadImage(f"float grey outside 0..1: {low:g}..{high:g}")
        white = 1
    elif tags and not signed:
        white = 2 ** tags[TiffImagePlugin.BITSPERSAMPLE][0] - 1
        values = values.view(np.uint32) if opened.mode == "I" else values  # Pillow's I is signed
    elif opened.format in _SCALED_TO_16_BITS and opened.mode != "F":
        white = 65535
    else:
        raise BadImage(f"grey of unknown range: {opened.format} of mode {opened.mode}{', signed' if signed else ''}")
    if tags and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0) == 0:
        values = white - values
    grey = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    if "transparency" in opened.info:  # one value of a PNG, in 16 bits as the others
        opaque = values != opened.info["transparency"]
        grey.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    return grey


def _flatten(image: Image.Image, background: str, mode: str) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert(mode)
    return image.convert(mode)


def decode_rgb(data: bytes) -> Image.Image:
    """Decode bytes that `clean_image` returned."""
    return Image.open(io.BytesIO(data)).convert("RGB")


@dataclass(frozen=True)
class Crop:
    """Which square of an image is used, so that what belongs to the image can be cropped alike."""

    width: int
    """Of the whole image once resized, px; one of width and height is the square's side."""
    height: int
    left: int
    """Of the square, px of the resized image."""
    top: int
    side: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom, for Pillow."""
        return self.left, self.top, self.left + self.side, self.top + self.side


def draw_crop(size: tuple[int, int], resolution: int, center_crop: bool, seed: int, sample_id: str) -> Crop:
    """The crop of an image of `size` (width, height): its shorter side becomes `resolution`.

    Without `center_crop` the crop's position is drawn from (seed, sample id).
    """
    scale = resolution / min(size)
    width, height = (max(resolution, round(side * scale)) for side in size)
    if center_crop:
        left, top = (width - resolution) // 2, (height - resolution) // 2
    else:
        rng = randomness.generator(seed, "crop", randomness.hash64(sample_id))
        left, top = rng.integers(0, [width - resolution + 1, height - resolution + 1]).tolist()
    return Crop(width, height, left, top, resolution)


def crop_image(image: Image.Image, crop: Crop, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The crop's square; the image's aspect ratio is that of the crop's, its size may be another."""
    if image.size != (crop.width, crop.height):
        image = image.resize((crop.width, crop.height), resample)
    return image.crop(crop.box)


def square_pixels(image: Image.Image, resolution: int, center_crop: bool, seed: int, sample_id: str) -> np.ndarray:
    """Resize the shorter side to `resolution` (Lanczos), crop, and scale: float32 [3, R, R] in -1..1."""
    square = crop_image(image, draw_crop(image.size, resolution, center_crop, seed, sample_id))
    return np.asarray(square, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1

"""From any image file to clean RGB, and on to the VAE's square."""

import io
import struct
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from sdtrain.data.images import DAMAGED_EXIF, BadImage, clean_image, decode_rgb, square_pixels

BLUE = "#0000ff"
ORIENTATION = 0x0112


def file_bytes(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def row_of(mode: str, *pixels) -> Image.Image:
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def cleaned(data: bytes, background: str = BLUE) -> list[list[tuple[int, ...]]]:
    """The cleaned image's rows of pixels, once its stored bytes are known to say the same."""
    stored, image, note = clean_image(data, background)
    assert image.mode == "RGB"
    assert note == ""
    assert np.array_equal(np.asarray(decode_rgb(stored)), np.asarray(image))
    return [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]


def test_rgba_is_composited_over_the_background():
    image = row_of("RGBA", (200, 100, 0, 128), (9, 9, 9, 0), (9, 8, 7, 255))
    assert cleaned(file_bytes(image)) == [[(100, 50, 127), (0, 0, 255), (9, 8, 7)]]


def test_grey_with_alpha_is_composited_over_the_background():
    assert cleaned(file_bytes(row_of("LA", (200, 0), (200, 255)))) == [[(0, 0, 255), (200, 200, 200)]]


def test_transparent_palette_entry_shows_the_background():
    image = row_of("P", 0, 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert cleaned(file_bytes(image, transparency=0)) == [[(0, 0, 255), (40, 50, 60)]]


def test_opaque_palette_keeps_its_colours():
    image = row_of("P", 0, 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert cleaned(file_bytes(image)) == [[(10, 20, 30), (40, 50, 60)]]


def test_transparent_colour_of_an_rgb_png_shows_the_background():
    data = file_bytes(row_of("RGB", (1, 2, 3), (4, 5, 6)), transparency=(1, 2, 3))
    assert cleaned(data) == [[(0, 0, 255), (4, 5, 6)]]


A, B = (255, 0, 0), (0, 255, 0)


@pytest.mark.parametrize(
    ("orientation", "upright"), [(1, [[A, B]]), (2, [[B, A]]), (3, [[B, A]]), (6, [[A], [B]]), (8, [[B], [A]])]
)
def test_exif_orientation_is_applied_once(orientation, upright):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert cleaned(file_bytes(row_of("RGB", A, B), exif=exif)) == upright


def exif_block(*entries: tuple[int, int, bytes], order: str = "<") -> bytes:
    """EXIF as cameras write it, from each tag's number, type and value of at most 4 bytes or of 8."""
    at = 8 + 2 + 12 * len(entries) + 4  # where values lie that don't fit into their entry
    head, values = struct.pack(f"{order}H", len(entries)), b""
    sizes = {ASCII: 1, SHORT: 2, LONG: 4, RATIONAL: 8, SIGNED_RATIONAL: 8}
    for tag, kind, value in entries:
        head += struct.pack(f"{order}HHL", tag, kind, len(value) // sizes[kind])
        head += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(f"{order}L", at + len(values))
        values += value if len(value) > 4 else b""
    return struct.pack(f"{order}2sHL", b"II" if order == "<" else b"MM", 42, 8) + head + b"\0\0\0\0" + values


ASCII, SHORT, LONG, RATIONAL, SIGNED_RATIONAL = 2, 3, 4, 5, 10
X_RESOLUTION, EXPOSURE_BIAS = 0x011A, 0x9204
TO_THE_RIGHT = (ORIENTATION, SHORT, b"\6\0")


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))


def with_exif(image: Image.Image, format: str, block: bytes) -> bytes:
    """A file with this EXIF; written by hand into a PNG, since Pillow looks at what it writes there."""
    if format != "PNG":
        options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
        return file_bytes(image, format, exif=b"Exif\0\0" + block, **options.get(format, {}))
    data = file_bytes(image)
    start = data.index(b"IDAT") - 4
    return data[:start] + png_chunk(b"eXIf", block) + data[start:]


DAMAGES = {
    "XResolution as a text": (X_RESOLUTION, ASCII, b"72 dpi\0\0"),
    "XResolution as one letter": (X_RESOLUTION, ASCII, b"7\0"),  # hides a JPEG from Pillow
    "XResolution of -1/0": (X_RESOLUTION, SIGNED_RATIONAL, struct.pack("<ll", -1, 0)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_damaged_exif_costs_neither_the_image_nor_its_orientation(format, orientation, damage):
    halves = Image.new("RGB", (32, 16), A)
    halves.paste(B, (16, 0, 32, 16))
    block = exif_block((ORIENTATION, SHORT, struct.pack("<H", orientation)), DAMAGES[damage])
    stored, image, note = clean_image(with_exif(halves, format, block), BLUE)
    assert note.startswith(f"{DAMAGED_EXIF}: ")
    upright = np.asarray(halves) if orientation == 1 else np.asarray(halves).transpose(1, 0, 2)
    assert np.abs(np.asarray(image).astype(int) - upright).max() <= 2
    assert np.array_equal(np.asarray(decode_rgb(stored)), np.asarray(image))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("block", "reason"),
    [
        pytest.param(b"what?", "not a TIFF file", id="no EXIF"),
        pytest.param(exif_block(TO_THE_RIGHT)[:6], "unpack requires", id="cut in its header"),
        pytest.param(exif_block((ORIENTATION, SHORT, b"\x09\0")), "orientation 9 isn't 1 to 8", id="orientation 9"),
        pytest.param(exif_block((ORIENTATION, ASCII, b"6\0")), "orientation '6' isn't 1 to 8", id="orientation a text"),
    ],
)
def test_an_image_whose_orientation_cannot_be_read_is_kept_as_it_lies(format, block, reason):
    data = with_exif(noise(16, 12), format, block)
    stored, image, note = clean_image(data, BLUE)
    assert note.startswith(f"{DAMAGED_EXIF}: {reason}")
    assert stored == data
    assert image.size == (16, 12)


@pytest.mark.parametrize("order", ["<", ">"])
def test_sound_exif_has_no_note(order):
    entries = [
        (ORIENTATION, SHORT, struct.pack(f"{order}H", 6)),
        (X_RESOLUTION, RATIONAL, struct.pack(f"{order}LL", 72, 1)),
    ]
    _, image, note = clean_image(with_exif(noise(16, 12), "JPEG", exif_block(*entries, order=order)), BLUE)
    assert note == ""
    assert image.size == (12, 16)


def tiff(values: np.ndarray, white_is_zero: bool = False, bits: int | None = None) -> bytes:
    """A TIFF of one row of greys of the array's own type, as Pillow can't write them all."""
    big = values.dtype.byteorder == ">"
    order, pixels = ">" if big else "<", values.tobytes()
    short = {
        258: bits or values.dtype.itemsize * 8,  # BitsPerSample
        262: 0 if white_is_zero else 1,  # PhotometricInterpretation
        339: {"u": 1, "i": 2, "f": 3}[values.dtype.kind],  # SampleFormat
    }
    long = {256: len(pixels) * 8 // short[258], 257: 1, 273: 200, 278: 1, 279: len(pixels)}
    entries = [(tag, SHORT, struct.pack(f"{order}H", value)) for tag, value in short.items()]
    entries += [(tag, LONG, struct.pack(f"{order}L", value)) for tag, value in long.items()]
    return exif_block(*sorted(entries), order=order).ljust(200, b"\0") + pixels


def png_of_16_bits(colour_type: int, *values: int, num_pixels: int = 1) -> bytes:
    header = struct.pack(">LLBBBBB", num_pixels, 1, 16, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def array(type: str, *values) -> np.ndarray:
    return np.array([values], dtype=type)


def grey(*values) -> Image.Image:
    return Image.fromarray(array("u2", *values))


SIXTEEN = (0, 200, 4095, 32768, 65535)  # / 257
EIGHT = [0, 1, 16, 128, 255]


@pytest.mark.parametrize(
    ("data", "greys"),
    [
        pytest.param(file_bytes(grey(200, 200)), [1, 1], id="PNG, dark all over"),
        pytest.param(file_bytes(grey(*SIXTEEN)), EIGHT, id="PNG"),
        pytest.param(file_bytes(grey(0, 4095)), [0, 16], id="PNG with 12 of its 16 bits used"),
        pytest.param(file_bytes(grey(*SIXTEEN), "JPEG2000"), EIGHT, id="JPEG 2000"),
        pytest.param(file_bytes(grey(*SIXTEEN), "PPM"), EIGHT, id="PGM, maxval 65535"),
        pytest.param(b"P5 4 1 4095\n" + array(">u2", 0, 200, 2048, 4095).tobytes(), [0, 12, 128, 255], id="PGM, 4095"),
        pytest.param(b"P2 3 1 1000\n0 200 1000\n", [0, 51, 255], id="plain PGM, maxval 1000"),
        pytest.param(tiff(array("<u2", *SIXTEEN)), EIGHT, id="TIFF"),
        pytest.param(tiff(array(">u2", *SIXTEEN)), EIGHT, id="TIFF, big-endian"),
        pytest.param(file_bytes(grey(*SIXTEEN), "TIFF", compression="tiff_lzw"), EIGHT, id="TIFF, compressed"),
        pytest.param(tiff(array("<u2", 0, 200, 65535), white_is_zero=True), [255, 254, 0], id="TIFF, white is zero"),
        pytest.param(tiff(array("u1", 0x00, 0xF, 0xFF), bits=12), [0, 255], id="TIFF, 12 bits"),
        pytest.param(tiff(array("<u4", 0, 65535, 2**31, 2**32 - 1)), [0, 0, 128, 255], id="TIFF, 32 bits"),
        pytest.param(tiff(array("<f4", 0, 0.2, 0.5, 1)), [0, 51, 128, 255], id="TIFF of floats"),
        pytest.param(tiff(array(">f4", 0.25), white_is_zero=True), [191], id="TIFF of floats, white is zero"),
        pytest.param(b"Pf 3 1 -1.0\n" + array("<f4", 0, 0.5, 1).tobytes(), [0, 128, 255], id="PFM"),
    ],
)
def test_a_grey_of_more_than_8_bits_is_scaled_by_its_declared_range(data, greys):
    assert cleaned(data) == [[(value,) * 3 for value in greys]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(tiff(array("<f4", 0, 812.5)), "float grey outside 0..1: 0..812.5", id="floats above 1"),
        pytest.param(tiff(array("<f4", -0.5, 1)), "float grey outside 0..1: -0.5..1", id="floats below 0"),
        pytest.param(tiff(array("<f4", 0, np.nan)), "float grey outside 0..1: nan..nan", id="NaN"),
        pytest.param(tiff(array("<f4", 0, np.inf)), "float grey outside 0..1: 0..inf", id="infinity"),
        pytest.param(tiff(array("i1", 0, -1)), "grey of unknown range: TIFF of mode L, signed", id="signed, 8 bits"),
        pytest.param(tiff(array("<i2", 0, 200)), "grey of unknown range: TIFF of mode I, signed", id="signed, 16 bits"),
        pytest.param(tiff(array(">i4", 0, 200)), "grey of unknown range: TIFF of mode I, signed", id="signed, 32 bits"),
        pytest.param(b"Pf 1 1 -2.0\n\0\0\0\0", "grey of unknown range: PPM of mode F", id="PFM of another scale"),
        pytest.param(file_bytes(grey(9), "IM"), "grey of unknown range: IM of mode I;16", id="IM"),
    ],
)
def test_a_grey_without_a_range_is_a_bad_image(data, reason):
    with pytest.raises(BadImage) as caught:
        clean_image(data, BLUE)
    assert str(caught.value) == reason


def test_transparent_value_of_a_16_bit_png_shows_the_background():
    data = file_bytes(grey(200, 201, 65535), transparency=200)
    assert cleaned(data) == [[(0, 0, 255), (1, 1, 1), (255, 255, 255)]]


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        pytest.param(png_of_16_bits(2, 200, 100 * 257 + 200, 65535), [(0, 101, 255)], id="PNG: the upper bytes"),
        pytest.param(
            png_of_16_bits(4, 0x0AFF, 65535, 65535, 0, num_pixels=2), [(10,) * 3, (0, 0, 255)], id="and alpha"
        ),
        pytest.param(b"P6 1 1 4095\n" + array(">u2", 0, 2048, 4095).tobytes(), [(0, 128, 255)], id="PPM: by maxval"),
    ],
)
def test_colours_of_16_bits_are_reduced_by_pillow(data, pixels):
    assert cleaned(data) == [pixels]


def test_cmyk_becomes_rgb():
    image = row_of("CMYK", (0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 0, 255))
    assert cleaned(file_bytes(image, "TIFF")) == [[(255, 0, 0), (0, 255, 0), (0, 0, 0)]]


@pytest.mark.parametrize(("mode", "pixel"), [("L", 77), ("1", 255)])
def test_grey_becomes_rgb(mode, pixel):
    assert cleaned(file_bytes(row_of(mode, pixel))) == [[(pixel,) * 3]]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_plain_rgb_keeps_its_bytes(format):
    data = file_bytes(noise(16, 12), format)
    stored, image, note = clean_image(data, BLUE)
    assert stored == data
    assert note == ""
    assert image.size == (16, 12)


def test_a_path_reads_as_its_bytes_do(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(file_bytes(noise(16, 12)))
    assert clean_image(str(path), BLUE)[0] == path.read_bytes()


PNG, JPEG, AVIF = (file_bytes(noise(32, 24), format) for format in ("PNG", "JPEG", "AVIF"))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(PNG[: len(PNG) // 2], id="truncated PNG"),
        pytest.param(JPEG[: len(JPEG) // 2], id="truncated JPEG"),
        pytest.param(AVIF.replace(b"iloc", b"free"), id="AVIF without its image"),
        pytest.param(PNG.replace(b"IDAT", b"IDAX"), id="PNG without its pixels"),
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>404</html>", id="text"),
    ],
)
def test_what_cannot_be_decoded_is_a_bad_image_with_a_short_reason(data):
    with pytest.raises(BadImage, match=r"^can't be decoded: .") as caught:
        clean_image(data, BLUE)
    reason = str(caught.value)
    assert len(reason) < 80
    assert "\n" not in reason
    assert "0x" not in reason


def test_an_image_too_large_to_decode_is_a_bad_image(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="exceeds limit"):
        clean_image(PNG, BLUE)


@pytest.mark.parametrize("fault", [AttributeError("no such thing"), ZeroDivisionError(), RecursionError("too deep")])
def test_whatever_pillow_raises_is_a_bad_image(monkeypatch, fault):
    def load(image):
        raise fault

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(BadImage, match=f"^can't be decoded: {str(fault) or 'ZeroDivisionError'}$"):
        clean_image(PNG, BLUE)


@pytest.mark.parametrize("fault", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["open", "load", "tobytes"])
def test_a_fault_that_is_not_the_images_is_not_taken_for_one(monkeypatch, fault, place):
    def raises(*args, **kwargs):
        raise fault

    owner = {"open": Image, "load": ImageFile.ImageFile, "tobytes": Image.Exif}[place]
    monkeypatch.setattr(owner, place, raises)
    with pytest.raises(fault):
        clean_image(JPEG, BLUE)


def test_a_warning_made_an_error_is_a_bad_image(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 24 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match=r"^can't be decoded: Image size \(768 pixels\) exceeds limit"):
            clean_image(PNG, BLUE)


def test_a_file_that_cannot_be_read_is_a_bad_image(tmp_path):
    with pytest.raises(BadImage, match=r"^can't be read: Is a directory$"):
        clean_image(str(tmp_path), BLUE)


def test_a_missing_file_is_a_bad_image(tmp_path):
    with pytest.raises(BadImage, match=r"^file is missing$"):
        clean_image(str(tmp_path / "none.png"), BLUE)


@st.composite
def damaged(draw, files: list[bytes]) -> bytes:
    """One of the files with a few bytes changed."""
    data = bytearray(draw(st.sampled_from(files)))
    for place in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
        data[place] = draw(st.one_of(st.integers(0, 13), st.integers(0, 255)))  # the small ones are types, too
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=200, derandomize=True)
@given(data=damaged([PNG, JPEG, AVIF, tiff(array("<u2", *range(99))), tiff(array("<f4", *np.linspace(0, 1, 99)))]))
def test_damaged_files_raise_nothing_but_bad_image(data):
    with suppress(BadImage):
        stored, image, _ = clean_image(data, BLUE)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(decode_rgb(stored)), np.asarray(image))


def camera_exif() -> bytes:
    exif = Image.Exif()
    exif.update({ORIENTATION: 6, X_RESOLUTION: 72.0, 0x0128: 2, 0x010F: "Maker", 0x0132: "2026:01:01 00:00:00"})
    exif.get_ifd(0x8769).update({0x829A: 0.01, EXPOSURE_BIAS: -0.3, 0x927C: b"maker's notes"})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return exif.tobytes()[len(b"Exif\0\0") :]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@settings(deadline=None, max_examples=200, derandomize=True)
@given(block=damaged([camera_exif(), exif_block(TO_THE_RIGHT, *DAMAGES.values())]))
def test_no_damage_to_exif_costs_an_image(format, block):
    stored, image, _ = clean_image(with_exif(noise(16, 12), format, block), BLUE)
    assert sorted(image.size) == [12, 16]
    assert np.array_equal(np.asarray(decode_rgb(stored)), np.asarray(image))


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=200, derandomize=True)
@given(data=damaged([with_exif(noise(4, 3), "TIFF", camera_exif()), with_exif(noise(4, 3), "AVIF", camera_exif())]))
def test_damaged_files_with_exif_raise_nothing_but_bad_image(data):
    with suppress(BadImage):
        stored, image, _ = clean_image(data, BLUE)
        assert np.array_equal(np.asarray(decode_rgb(stored)), np.asarray(image))


@settings(deadline=None, max_examples=40)
@given(width=st.integers(1, 90), height=st.integers(1, 90), resolution=st.integers(1, 48), center_crop=st.booleans())
def test_square_pixels_are_a_square_in_range(width, height, resolution, center_crop):
    square = square_pixels(noise(width, height), resolution, center_crop, 0, "some id")
    assert square.shape == (3, resolution, resolution)
    assert square.dtype == np.float32
    assert square.min() >= -1
    assert square.max() <= 1


def test_pixels_are_scaled_to_minus_one_and_one():
    square = square_pixels(Image.new("RGB", (2, 2), (0, 255, 51)), 2, True, 0, "")
    assert square[:, 0, 0] == pytest.approx([-1, 1, -0.6])


@pytest.mark.parametrize(("size", "box"), [((6, 2), (2, 0, 4, 2)), ((2, 6), (0, 2, 2, 4)), ((5, 2), (1, 0, 3, 2))])
def test_center_crop_takes_the_middle(size, box):
    image = noise(*size)
    expected = np.asarray(image.crop(box)).transpose(2, 0, 1) / 127.5 - 1
    assert square_pixels(image, 2, True, 0, "id") == pytest.approx(expected, abs=1e-6)


def test_the_shorter_side_is_resized_to_the_resolution():
    halves = Image.new("RGB", (80, 40), "#000000")
    halves.paste("#ffffff", (40, 0, 80, 40))
    square = square_pixels(halves, 20, True, 0, "id")  # 40 x 20, of which the middle 20 columns are kept
    assert (square[:, :, :6] == -1).all()
    assert (square[:, :, 14:] == 1).all()


def windows(seed: int, ids: range) -> list[int]:
    """The left edges that random crops of 4 px take from a strip of 4 x 12 px whose columns count upward."""
    strip = Image.fromarray(np.broadcast_to(np.arange(12, dtype=np.uint8)[None, :, None], (4, 12, 3)).copy())
    squares = [np.rint((square_pixels(strip, 4, False, seed, str(i)) + 1) * 127.5) for i in ids]
    for square in squares:
        assert np.array_equal(square, np.broadcast_to(square[0, 0, 0] + np.arange(4), (3, 4, 4)))
    return [int(square[0, 0, 0]) for square in squares]


def test_random_crop_depends_on_seed_and_id_only():
    assert windows(0, range(20)) == windows(0, range(20))
    assert windows(0, range(20)) != windows(1, range(20))


def test_random_crop_reaches_every_place():
    assert set(windows(0, range(150))) == set(range(9))

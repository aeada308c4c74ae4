"""From any picture file to clean RGB, and on to the VAE's square."""

import io
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdtrain.images import BadPicture, clean_picture, decode_rgb, square_pixels

BLUE = "#0000ff"
ORIENTATION = 0x0112


def file_bytes(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def row_of(mode: str, *pixels) -> Image.Image:
    picture = Image.new(mode, (len(pixels), 1))
    picture.putdata(pixels)
    return picture


def cleaned(data: bytes, background: str = BLUE) -> list[list[tuple[int, ...]]]:
    """The cleaned picture's rows of pixels, once its stored bytes are known to say the same."""
    stored, picture = clean_picture(data, background)
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(decode_rgb(stored)), np.asarray(picture))
    return [[tuple(pixel) for pixel in row] for row in np.asarray(picture).tolist()]


def test_rgba_is_composited_over_the_background():
    picture = row_of("RGBA", (200, 100, 0, 128), (9, 9, 9, 0), (9, 8, 7, 255))
    assert cleaned(file_bytes(picture)) == [[(100, 50, 127), (0, 0, 255), (9, 8, 7)]]


def test_grey_with_alpha_is_composited_over_the_background():
    assert cleaned(file_bytes(row_of("LA", (200, 0), (200, 255)))) == [[(0, 0, 255), (200, 200, 200)]]


def test_transparent_palette_entry_shows_the_background():
    picture = row_of("P", 0, 1)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    assert cleaned(file_bytes(picture, transparency=0)) == [[(0, 0, 255), (40, 50, 60)]]


def test_opaque_palette_keeps_its_colours():
    picture = row_of("P", 0, 1)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    assert cleaned(file_bytes(picture)) == [[(10, 20, 30), (40, 50, 60)]]


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


def test_16_bit_grey_is_scaled():
    picture = Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16))
    assert cleaned(file_bytes(picture)) == [[(value,) * 3 for value in (0, 1, 128, 255)]]


def test_cmyk_becomes_rgb():
    picture = row_of("CMYK", (0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 0, 255))
    assert cleaned(file_bytes(picture, "TIFF")) == [[(255, 0, 0), (0, 255, 0), (0, 0, 0)]]


@pytest.mark.parametrize(("mode", "pixel"), [("L", 77), ("1", 255)])
def test_grey_becomes_rgb(mode, pixel):
    assert cleaned(file_bytes(row_of(mode, pixel))) == [[(pixel,) * 3]]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_plain_rgb_keeps_its_bytes(format):
    data = file_bytes(noise(16, 12), format)
    stored, picture = clean_picture(data, BLUE)
    assert stored == data
    assert picture.size == (16, 12)


def test_a_path_reads_as_its_bytes_do(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(file_bytes(noise(16, 12)))
    assert clean_picture(str(path), BLUE)[0] == path.read_bytes()


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
def test_what_cannot_be_decoded_is_a_bad_picture_with_a_short_reason(data):
    with pytest.raises(BadPicture, match=r"^can't be decoded: .") as caught:
        clean_picture(data, BLUE)
    reason = str(caught.value)
    assert len(reason) < 80
    assert "\n" not in reason
    assert "0x" not in reason


def test_a_picture_too_large_to_decode_is_a_bad_picture(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadPicture, match="exceeds limit"):
        clean_picture(PNG, BLUE)


def test_a_missing_file_is_a_bad_picture(tmp_path):
    with pytest.raises(BadPicture, match=r"^file is missing$"):
        clean_picture(str(tmp_path / "none.png"), BLUE)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(data=st.data())
def test_damaged_files_raise_nothing_but_bad_picture(data):
    damaged = bytearray(data.draw(st.sampled_from([PNG, JPEG, AVIF])))
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    with suppress(BadPicture):
        assert clean_picture(bytes(damaged), BLUE)[1].mode == "RGB"


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
    picture = noise(*size)
    expected = np.asarray(picture.crop(box)).transpose(2, 0, 1) / 127.5 - 1
    assert square_pixels(picture, 2, True, 0, "id") == pytest.approx(expected, abs=1e-6)


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

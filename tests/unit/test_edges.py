"""Hints computed from an image, and read from a file."""

import numpy as np
import pytest
from PIL import Image

from sdtrain.data.conditions import read_condition
from sdtrain.data.edges import canny_edges
from sdtrain.ground.errors import InputError


def test_edges_are_binary_vary_their_thresholds_and_follow_the_id():
    rng = np.random.default_rng(0)
    image = np.asarray(
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    )
    pixels = image.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
    drawn = [canny_edges(pixels, 0, f"id {number}") for number in range(8)]
    assert {value for edges in drawn for value in np.unique(edges)} == {0, 255}
    assert drawn[0].shape == (1, 64, 64)
    assert len({edges.tobytes() for edges in drawn}) > 1
    assert np.array_equal(drawn[0], canny_edges(pixels, 0, "id 0"))
    flat = canny_edges(np.zeros((3, 64, 64), dtype=np.float32), 0, "id")
    assert not flat.any()


def test_a_hint_from_a_file_becomes_the_drawn_square(tmp_path):
    Image.fromarray(np.repeat(np.arange(0, 200, dtype=np.uint8)[None], 100, 0)).save(tmp_path / "hint.png")
    found = np.asarray(read_condition("hint", tmp_path / "hint.png", 100))
    assert found.shape == (100, 100, 3)
    assert found[0, 0, 0] == 50
    assert found[0, -1, 0] == 149
    (tmp_path / "hint.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"hint.png: can't be decoded"):
        read_condition("hint", tmp_path / "hint.png", 100)


def test_an_edge_of_hue_alone_is_an_edge():
    """Equal grey on both sides."""
    red, blue = (np.array(color, dtype=np.float32) for color in ((200, 40, 40), (40, 100, 160)))
    pixels = np.broadcast_to(red[:, None, None], (3, 32, 32)).copy()
    pixels[:, :, 16:] = blue[:, None, None]
    edges = canny_edges(pixels / 127.5 - 1, 0, "id")[0]
    assert edges[:, 14:18].any(axis=1).all()
    assert not edges[:, :12].any()

"""Text in the header of a .safetensors file changes no tensor, is the same bytes everywhere, and is there or isn't."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdtrain.ground import headers
from sdtrain.ground.errors import DiskFullError, InputError
from sdtrain.ground.files import sha256_file
from sdtrain.ground.headers import add_metadata, read_metadata, read_shapes

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "a": torch.tensor([0.1, float("nan"), -0.0]),
    "odd": torch.tensor([1, 2, 3], dtype=torch.int8),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(7, dtype=torch.int64),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", "title": "old"})
    return path


def header_of(path) -> tuple[bytes, bytes]:
    """The header, and the data behind it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def assert_same_tensors(path, tensors=TENSORS) -> None:
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    with safe_open(path, framework="pt") as opened:
        for name, tensor in tensors.items():
            for found in (loaded[name], opened.get_tensor(name)):
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                assert found.numpy().tobytes() == tensor.numpy().tobytes()


def test_texts_are_added_and_new_ones_win(file):
    _, data = header_of(file)
    add_metadata(file, {"title": "new", "author": "someone"})
    assert read_metadata(file) == {"format": "pt", "title": "new", "author": "someone"}
    assert header_of(file)[1] == data
    assert_same_tensors(file)
    assert list(file.parent.iterdir()) == [file]


def test_header_is_canonical(file):
    """Texts sorted, tensors in the order of the file, no white space but the padding."""
    tensors = [name for name in json.loads(header_of(file)[0]) if name != "__metadata__"]
    for length in range(8):
        add_metadata(file, {"z": "x" * length, "a": "", "M": ""})
        header, _ = header_of(file)
        assert len(header) % 8 == 0
        texts = json.loads(header)
        assert list(texts) == ["__metadata__", *tensors]
        assert list(texts["__metadata__"]) == ["M", "a", "format", "title", "z"]
        assert header.rstrip(b" ") == json.dumps(texts, separators=(",", ":")).encode()
        assert_same_tensors(file)


def test_shapes_are_told_by_name(file, tmp_path):
    expected = {"b.weight": (2, 3), "a": (3,), "odd": (3,), "empty": (0, 4), "scalar": ()}
    assert read_shapes(file) == expected
    add_metadata(file, {"a": "a text of a tensor's name"})
    assert read_shapes(file) == expected
    save_file({}, tmp_path / "none.safetensors")
    assert read_shapes(tmp_path / "none.safetensors") == {}


def test_same_bytes_in_every_process(tmp_path):
    code = """
import sys, torch, pathlib
from safetensors.torch import save_file
from sdtrain.ground.headers import add_metadata
file = pathlib.Path(sys.argv[1])
save_file({"b": torch.ones(3), "a": torch.zeros(2)}, file, metadata={k: k for k in ("format", "x", "y", "z", "lora")})
add_metadata(file, {k: k for k in set("hgfedcb")})
"""
    hashes = set()
    for seed in range(3):
        path = tmp_path / f"{seed}.safetensors"
        subprocess.run([sys.executable, "-c", code, path], check=True, env={**os.environ, "PYTHONHASHSEED": str(seed)})
        hashes.add(sha256_file(path))
    assert len(hashes) == 1


def test_adding_again_changes_no_byte(file):
    add_metadata(file, {"b": "1", "a": "2"})
    once = file.read_bytes()
    add_metadata(file, {"a": "2"})
    add_metadata(file, {})
    assert file.read_bytes() == once


def test_any_text_survives(file):
    texts = {
        "prompt": "ein grüner Kreis, 緑の円 🟢",
        "schlüssel": 'quote " and \\ and \n',
        "json": json.dumps({"a": [1]}),
    }
    add_metadata(file, texts)
    assert read_metadata(file) == {"format": "pt", "title": "old", **texts}
    assert "緑の円".encode() in header_of(file)[0]
    assert_same_tensors(file)


@pytest.mark.parametrize("tensors", [{}, {"empty": torch.zeros(0, 4)}, TENSORS])
def test_file_without_texts(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    assert read_metadata(path) == {}
    add_metadata(path, {"a": "b"})
    assert read_metadata(path) == {"a": "b"}
    assert_same_tensors(path, tensors)


def test_others_may_read_it_as_any_new_file(file, tmp_path):
    """safetensors' own writer shuts them out, and the program that loads a model may run as another user."""
    file.chmod(0o600)
    add_metadata(file, {"a": "b"})
    (tmp_path / "new").touch()
    assert file.stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), DiskFullError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_failing_write_leaves_the_old_file(file, monkeypatch, error, told):
    def copy_half(source, target, length):
        target.write(source.read(3))
        raise error

    before = file.read_bytes()
    monkeypatch.setattr(headers.shutil, "copyfileobj", copy_half)
    with pytest.raises(told, match="model.safetensors" if told is DiskFullError else None):
        add_metadata(file, {"a": "b"})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("metadata", [{"steps": 10}, {"loss": None}])
def test_what_is_not_text_is_refused_before_it_is_written(file, metadata):
    before = file.read_bytes()
    with pytest.raises(AssertionError, match="metadata must be text"):
        add_metadata(file, metadata)
    assert file.read_bytes() == before


DAMAGES = {
    "nothing in it": lambda data: b"",
    "shorter than a length": lambda data: data[:5],
    "a length beyond the file": lambda data: (10**7).to_bytes(8, "little") + data[8:],
    "a length beyond any header": lambda data: b"\xff" * 8 + data[8:],
    "a header that isn't JSON": lambda data: data[:9] + b"}" + data[10:],
    "a header that isn't UTF-8": lambda data: data[:10] + b"\xff" + data[11:],
    "a header that isn't an object": lambda data: (8).to_bytes(8, "little") + b"[]      ",
    "data cut short": lambda data: data[:-1],
    "something behind the data": lambda data: data + b"0",
    "a zip": lambda data: b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_named_and_left_alone(file, damage):
    data = DAMAGES[damage](file.read_bytes())
    file.write_bytes(data)
    for fault in (lambda: read_metadata(file), lambda: read_shapes(file), lambda: add_metadata(file, {"a": "b"})):
        with pytest.raises(InputError, match=r"model\.safetensors: not a complete \.safetensors file: "):
            fault()
    assert file.read_bytes() == data
    assert list(file.parent.iterdir()) == [file]


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"a\.safetensors: no such file"):
        add_metadata(tmp_path / "a.safetensors", {})
    for read in (read_metadata, read_shapes):
        with pytest.raises(InputError, match=f"{tmp_path.name}: can't be read"):
            read(tmp_path)

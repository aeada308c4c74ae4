"""Text in the header of a .safetensors file.

The format (README of huggingface/safetensors, "Format"): 8 bytes with the header's length, little-endian; the header,
JSON that may end with spaces; the tensors' data, to which the header's offsets are relative.
"""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import PARTIAL, disk_errors_explained

_METADATA = "__metadata__"
_MAX_HEADER_BYTES = 100_000_000
"""Readers refuse longer ones."""


def read_metadata(file: Path) -> dict[str, str]:
    """The texts in the header of a .safetensors file, by key.

    Raises:
        InputError: it's missing, damaged or no .safetensors file.
    """
    try:
        with safe_open(file, framework="np") as opened:  # checks the whole header against the file's size
            return opened.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error}") from None
    except SafetensorError as error:
        raise InputError(f"{file}: not a complete .safetensors file: {error}") from None


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a .safetensors file, by name; reads the header only.

    Raises:
        InputError: as `read_metadata`.
    """
    read_metadata(file)
    with safe_open(file, framework="np") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def add_metadata(file: Path, metadata: dict[str, str]) -> None:
    """Add texts to the header of a .safetensors file; one whose key is there replaces the old one.

    The texts are sorted by key: safetensors' own writer puts them in another order in every process, and equal content
    should be equal bytes. A failure leaves the old file as it was.

    Raises:
        InputError: it's missing, damaged or no .safetensors file.
    """
    texts = {**read_metadata(file), **metadata}
    not_text = [key for key, value in texts.items() if not isinstance(value, str)]
    assert not not_text, f"metadata must be text, {not_text[0]!r} isn't"
    partial = file.with_name(file.name + PARTIAL)
    with disk_errors_explained(str(file), file.parent):
        try:
            with file.open("rb") as source, partial.open("wb") as target:
                tensors = json.loads(source.read(int.from_bytes(source.read(8), "little")))
                tensors.pop(_METADATA, None)
                header = _encoded({_METADATA: dict(sorted(texts.items())), **tensors})
                target.write(len(header).to_bytes(8, "little"))
                target.write(header)
                shutil.copyfileobj(source, target, length=2**24)
            os.replace(partial, file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _encoded(header: dict) -> bytes:
    """JSON, with spaces to a multiple of 8 bytes so that the tensors' data stays aligned."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= _MAX_HEADER_BYTES, f"a header of {len(text)} bytes, at most {_MAX_HEADER_BYTES} are allowed"
    return text

"""Files and folders that are either whole or not there, and their hashes."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdtrain.errors import InputError

PARTIAL = ".partial"
"""Suffix of what is being written or deleted."""


@contextmanager
def new_folder(out: Path, durable: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes its place once the body has ended well.

    A body that raises leaves neither a new `out` nor the half-written folder behind.

    Args:
        durable: flush it to the disk first, so that it is whole even after a power cut.
    """
    partial = out.with_name(out.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if durable:
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    if durable:
        _flush(out.parent)


def delete_folder(folder: Path) -> None:
    """Delete a folder that is whole for others until it is gone."""
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    folder.rename(partial)
    shutil.rmtree(partial)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name and rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, tree: Any) -> None:
    """Write indented JSON; refuses NaN and infinity (`ValueError`), which JSON doesn't have."""
    write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; `InputError` names it where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(tree: Any) -> str:
    """SHA-256 of a JSON tree in its canonical form: sorted keys, no white space."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

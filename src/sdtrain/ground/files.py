"""Files and folders that are either complete or not there, and their hashes.

A sealed folder lists the SHA-256 of each of its files in `SHA256SUMS`, in the format of coreutils:
`sha256sum --check SHA256SUMS` in the folder checks it.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdtrain.ground.errors import DiskFullError, InputError

PARTIAL = ".partial"
"""Suffix of what is being written or deleted."""
SEAL = "SHA256SUMS"
"""The file that lists a sealed folder's files."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def new_folder(out: Path, durable: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `out` that replaces it once the body has succeeded.

    A body that raises leaves neither a new `out` nor the half-written folder behind.

    Args:
        durable: flush it to the disk first, so that it is complete even after a power cut.
    """
    partial = out.with_name(out.name + PARTIAL)
    with disk_errors_explained(str(out), out.parent):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            if durable:
                for path in [*partial.rglob("*"), partial]:
                    _flush(path)
            if out.exists():
                shutil.rmtree(out)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if durable:
            _flush(out.parent)


def delete_folder(folder: Path) -> None:
    """Delete a folder so that others see it complete or not at all."""
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
    """Write UTF-8 as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary name and rename, so that a reader never sees half a file."""
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors_explained(str(path), path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, tree: Any) -> None:
    """Write indented JSON; refuses NaN and infinity (`ValueError`), which JSON doesn't have."""
    write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises an `InputError` that names it if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(tree: Any) -> str:
    """SHA-256 of a JSON tree in its canonical form: sorted keys, no white space."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal_folder(folder: Path, known: dict[str, str] | None = None) -> None:
    """List the SHA-256 of every file in the folder; must be the last write to it.

    Args:
        known: hashes by name of files that needn't be read again.
    """
    hashes = {name: (known or {}).get(name) or sha256_file(folder / name) for name in _files_in(folder)}
    write_text(folder / SEAL, _seal_of(hashes))


def _seal_of(hashes: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))


def check_sealed(folder: Path) -> dict[str, str]:
    """Check every file of a sealed folder against its hash; returns the hashes by name.

    Raises:
        InputError: names the file that is missing, changed or new.
    """
    if not (folder / SEAL).is_file():
        raise InputError(f"{folder} has no {SEAL}")
    try:
        text = (folder / SEAL).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / SEAL} can't be read: {error}") from None
    hashes = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    if text != _seal_of(hashes):
        raise InputError(f"{folder / SEAL} was changed after it was written")
    check_files(folder, hashes, SEAL)
    return hashes


def is_sealed(folder: Path) -> bool:
    """Whether the folder is there, sealed and undamaged."""
    try:
        check_sealed(folder)
    except InputError:
        return False
    return True


def check_files(folder: Path, hashes: dict[str, str], listed_in: str) -> None:
    """Check that the folder has exactly the files with these hashes, by name; `listed_in` and hidden files don't count.

    Raises:
        InputError: names the file that is missing, changed or new.
    """
    found = _files_in(folder)
    for name in hashes:
        if name not in found:
            raise InputError(f"{folder / name} is missing")
    for name in found:
        if name not in hashes and name != listed_in:
            raise InputError(f"{folder / name} isn't listed in {listed_in}")
    for name, expected in hashes.items():
        check_hash(folder / name, expected, listed_in)


def check_hash(path: Path, expected: str, listed_in: str) -> None:
    """Check that the file can be read and has this SHA-256.

    Raises:
        InputError: names both hashes.
    """
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from None
    if digest != expected:
        raise InputError(f"{path} has SHA-256 {digest[:12]}…, expected {expected[:12]}… by {listed_in}")


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to an unused name, which is returned."""
    number, target = 1, path.with_name(f"{path.name}.damaged")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(target)
    return target


def disk_is_full(error: BaseException) -> bool:
    """Whether a full disk or quota caused this error; not all libraries pass on the system's own exception."""
    if isinstance(error, DiskFullError) or getattr(error, "errno", None) in _NO_SPACE:
        return True
    # shutil.copytree joins the texts of its errors; safetensors has its own exception.
    is_foreign = isinstance(error, shutil.Error) or type(error).__name__ == "SafetensorError"
    return is_foreign and any(os.strerror(number) in str(error) for number in _NO_SPACE)


@contextmanager
def disk_errors_explained(
    what: str | None = None,
    place: Path | None = None,
    needs_bytes: int | None = None,
    safe: Callable[[], str] | None = None,
) -> Iterator[None]:
    """Turn a full disk's error into one that says what couldn't be written, and what is safe.

    In nested contexts the outer one's arguments win; what it leaves out is taken from the inner one.

    Args:
        place: a folder on the disk that is written to.

    Raises:
        DiskFullError: the disk or quota is full.
    """
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise disk_full(error, what, place, needs_bytes, safe() if safe else None) from None


def disk_full(
    error: Exception,
    what: str | None = None,
    place: Path | None = None,
    needs_bytes: int | None = None,
    safe: str | None = None,
) -> DiskFullError:
    """A full disk's error as a `DiskFullError`; arguments that are None are taken from `error` where it has them."""
    inner = error if isinstance(error, DiskFullError) else None
    name = getattr(error, "filename", None)
    return DiskFullError(
        what or (inner.what if inner else str(name or "a file")),
        inner.needs_bytes if inner and needs_bytes is None else needs_bytes,
        inner.free_bytes if inner and place is None else _free_bytes(place or (name and Path(os.fsdecode(name)))),
        inner.safe if inner and safe is None else safe,
    )


def existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _free_bytes(place: Path | None) -> int | None:
    try:
        return shutil.disk_usage(existing(place)).free if place else None
    except OSError:
        return None


def _files_in(folder: Path) -> list[str]:
    """Names of all files in a folder and those below it, sorted; without hidden ones and the seal itself."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name != SEAL and not any(part.startswith(".") for part in name.split("/"))]

"""Bytes, counted and put into words."""

from pathlib import Path


def folder_bytes(folder: Path) -> int:
    """What the folder's files hold."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def gib(num_bytes: int) -> str:
    """In GiB."""
    return f"{num_bytes / 2**30:.2f} GiB"


def size(num_bytes: int | None) -> str:
    """In GiB or MiB, whichever suits it."""
    if num_bytes is None:
        return "unknown"
    return gib(num_bytes) if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"

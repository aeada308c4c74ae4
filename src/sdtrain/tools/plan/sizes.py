"""Sizes in bytes, counted and formatted."""

from pathlib import Path


def folder_bytes(folder: Path) -> int:
    """Size of the folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def gib(num_bytes: int) -> str:
    """In GiB."""
    return f"{num_bytes / 2**30:.2f} GiB"


def size(num_bytes: int | None) -> str:
    """In GiB, or in MiB if smaller than 1 GiB."""
    if num_bytes is None:
        return "unknown"
    return gib(num_bytes) if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"

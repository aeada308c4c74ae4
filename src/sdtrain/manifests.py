"""What the folders between the stages say of themselves: format, origin, fingerprint.

Each of `data/base`, `data/dataset` and `data/latents` holds a `manifest.json`. The next stage reads
it before it trusts the folder.
"""

from pathlib import Path

from sdtrain.errors import InputError
from sdtrain.files import read_json, sha256_json

FORMATS = {"base": 1, "dataset": 1, "latents": 2}
"""Folder's kind: the version of its format that this code writes and reads."""
_STAGES = {"base": "base", "dataset": "dataset", "latents": "precompute"}


def read_manifest(folder: Path, kind: str) -> dict:
    """The manifest of a folder of the given kind.

    Raises:
        InputError: the folder is missing, or was written in another format than this code reads.
    """
    path, again = folder / "manifest.json", f"run `dvc repro {_STAGES[kind]}`"
    if not path.exists():
        raise InputError(f"{folder} has no manifest.json; {again}")
    manifest = read_json(path)
    if manifest.get("format_version") != FORMATS[kind]:
        found = manifest.get("format_version")
        raise InputError(f"{path}: format_version {found}, this code reads {FORMATS[kind]}; {again}")
    return manifest


def encoders_fingerprint(base: Path) -> str:
    """SHA-256 of what a latent cache depends on: the VAE's and the tokenizer's files."""
    files = read_manifest(base, "base")["files"]
    return sha256_json({name: digest for name, digest in files.items() if name.startswith(("vae/", "tokenizer/"))})

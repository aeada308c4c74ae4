"""What the folders between the stages say of themselves: format, origin, fingerprint.

Each of `data/base`, `data/dataset` and `data/latents` holds a `manifest.json`. The next stage reads
it before it trusts the folder.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import check_files, check_hash, read_json, sha256_json

FORMATS = {"base": 1, "dataset": 1, "latents": 2}
"""Folder's kind: the version of its format that this code writes and reads."""
_STAGES = {"base": "base", "dataset": "dataset", "latents": "precompute"}
_MAX_HASHED_BYTES = 8 * 2**30
"""Of a latent cache: up to here its shards are read and hashed before a run, in some 10 s; beyond, only their heads."""


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True)


class _Base(_Manifest):
    sources: list[dict]
    files: dict[str, str]


class _Dataset(_Manifest):
    splits: dict[str, dict]


class _Shard(_Manifest):
    file: str
    num_rows: NonNegativeInt
    sha256: str


class _Splits(_Manifest):
    train: list[_Shard]
    validation: list[_Shard]


class _Latents(_Manifest):
    encoders_fingerprint: str
    params: dict[str, Any]
    seed: int
    max_token_id: NonNegativeInt
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    splits: _Splits


_RECORDS = {"base": _Base, "dataset": _Dataset, "latents": _Latents}


def read_manifest(folder: Path, kind: str) -> dict:
    """The manifest of a folder of the given kind.

    Raises:
        InputError: the folder or its manifest is missing, broken, or of another format than this code reads.
    """
    path, again = folder / "manifest.json", f"run `dvc repro {_STAGES[kind]}`"
    if not path.exists():
        raise InputError(f"{folder} has no manifest.json; {again}")
    try:
        manifest = read_json(path)
    except InputError as fault:
        raise InputError(f"{fault}; {again}") from None
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: is a {type(manifest).__name__}, not an object; {again}")
    if manifest.get("format_version") != FORMATS[kind]:
        found = manifest.get("format_version")
        raise InputError(f"{path}: format_version {found}, this code reads {FORMATS[kind]}; {again}")
    try:
        _RECORDS[kind].model_validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}; {again}") from None
    return manifest


def check_base_files(base: Path) -> None:
    """Read every file of the base: it must be what the stage `base` wrote.

    Raises:
        InputError: names the file that is missing, changed or new.
    """
    try:
        check_files(base, read_manifest(base, "base")["files"], "manifest.json")
    except InputError as fault:
        raise InputError(f"{fault}; {_remedy(base, 'base')}") from None


def check_latent_files(latents: Path) -> None:
    """Read every shard of a latent cache, unless it is too large for that: it must be what was written.

    Raises:
        InputError: names the shard that is missing or changed.
    """
    shards = [shard for split in read_manifest(latents, "latents")["splits"].values() for shard in split]
    try:
        num_bytes = sum((latents / shard["file"]).stat().st_size for shard in shards)
        if num_bytes > _MAX_HASHED_BYTES:
            print(f"{latents}: {num_bytes / 2**30:.0f} GiB of shards, whose heads are checked but not their hashes")
            return
        for shard in shards:
            check_hash(latents / shard["file"], shard["sha256"], "manifest.json")
    except InputError as fault:
        raise InputError(f"{fault}; {_remedy(latents, 'latents')}") from None
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is missing; {_remedy(latents, 'latents')}") from None


def encoders_fingerprint(base: Path) -> str:
    """SHA-256 of what a latent cache depends on: the VAE's and the tokenizer's files."""
    files = read_manifest(base, "base")["files"]
    return sha256_json({name: digest for name, digest in files.items() if name.startswith(("vae/", "tokenizer/"))})


def _remedy(folder: Path, kind: str) -> str:
    return f"restore it with `dvc checkout {folder}`, or run `dvc repro --force --single-item {_STAGES[kind]}`"

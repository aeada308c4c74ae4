"""The manifests of the folders between the stages: format, origin, fingerprint.

`data/base`, `data/dataset`, `data/latents` and `data/features` each have a `manifest.json`, which the next stage checks
before it uses the folder.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import check_files, check_hash, read_json, sha256_json, write_json

_NAME = "manifest.json"
_MAX_HASHED_BYTES = 8 * 2**30
"""Up to this size a latent cache's shards are hashed before a run, in some 10 s; beyond, only headers are read."""


SPLITS = ("train", "validation")
"""Of every data set."""
TEST = "test"
"""The further split of a data set with a `dataset.test_fraction`."""
LIT_WORLDS = ("lit", "lit_by_map")
"""Of `dataset.world`, those whose scenes have a known light."""


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def _all_splits(splits: dict) -> dict:
    if sorted(splits) not in (sorted(SPLITS), sorted([*SPLITS, TEST])):
        raise ValueError(f"must be train and validation, and may be test, found {', '.join(splits) or 'none'}")
    return splits


class Manifest(_Record):
    """A folder's manifest; `format_version` is the version that this code writes and reads."""

    VERSION: ClassVar[int]
    STAGE: ClassVar[str]
    """The stage that writes the folder."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a folder of this kind.

        Raises:
            InputError: the folder or its manifest is missing or broken, or has another format version.
        """
        path, again = folder / _NAME, f"run `dvc repro {cls.STAGE}`"
        if not path.exists():
            raise InputError(f"{folder} has no {_NAME}; {again}")
        try:
            tree = read_json(path)
        except InputError as fault:
            raise InputError(f"{fault}; {again}") from None
        if not isinstance(tree, dict):
            raise InputError(f"{path}: expected an object, got {type(tree).__name__}; {again}")
        if tree.get("format_version") != cls.VERSION:
            found = tree.get("format_version")
            raise InputError(f"{path}: format_version {found}, this code reads {cls.VERSION}; {again}")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            fault = error.errors()[0]
            raise InputError(f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}; {again}") from None

    def write(self, folder: Path) -> None:
        """Write it to its folder."""
        write_json(folder / _NAME, self.model_dump(mode="json"))


class BaseManifest(Manifest):
    """Of `data/base`."""

    VERSION, STAGE = 1, "base"

    format_version: Literal[1] = 1
    sources: list[dict[str, Any]]
    """Where each part comes from."""
    files: dict[str, str]
    """SHA-256 by name."""

    @property
    def is_from_scratch(self) -> bool:
        """Whether the UNet has never been trained."""
        return any("unet_config" in source for source in self.sources)


class FeaturesManifest(Manifest):
    """Of `data/features`."""

    VERSION, STAGE = 1, "features"

    format_version: Literal[1] = 1
    source: dict[str, str | None] | None
    """Where the image encoder comes from; null if there is none."""
    files: dict[str, str]
    """SHA-256 by name."""

    @property
    def label(self) -> str | None:
        """What the encoder is called in the names of metrics, e.g. `dinov2_small`; None if there is none."""
        if self.source is None:
            return None
        name = Path(self.source.get("repo") or self.source["path"]).resolve().name
        return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


class DatasetSplit(_Record):
    """A split's parquet shards."""

    num_rows: NonNegativeInt
    num_shards: NonNegativeInt
    ids_sha256: str


class DatasetCondition(_Record):
    """A further column of the data set, of images."""

    channels: PositiveInt
    """The most that any of them has: 1 if all are grey, 4 where a part of one is transparent."""


class DatasetLight(_Record):
    """A further column of the data set, of light maps."""

    shape: tuple[PositiveInt, PositiveInt, Literal[3]]
    """Height, width and channels of every map."""

    @property
    def channels(self) -> int:
        """As images have."""
        return self.shape[-1]


class DatasetManifest(Manifest):
    """Of `data/dataset`."""

    VERSION, STAGE = 1, "dataset"

    format_version: Literal[1] = 1
    source: dict[str, Any]
    conditions: dict[str, DatasetCondition | DatasetLight] = {}
    """What belongs to each image besides the caption, by name."""
    splits: Annotated[dict[str, DatasetSplit], AfterValidator(_all_splits)]
    dropped: dict[str, PositiveInt]
    """Number of inputs that were dropped, by reason."""
    noted: dict[str, PositiveInt]
    """Number of rows with a note, by note."""
    fingerprint: str

    @property
    def world(self) -> str | None:
        """Of generated scenes, `dataset.world`."""
        return self.source.get("world", "shapes") if "generated" in self.source else None

    @property
    def is_lit(self) -> bool:
        """Whether its scenes are lit, to be relit."""
        return self.world in LIT_WORLDS


class Shard(_Record):
    """One file of latents."""

    file: str
    num_rows: NonNegativeInt
    sha256: str


class CachedCondition(_Record):
    """A further column of the cache."""

    kind: Literal["pixels", "latents", "mask", "light"]
    """`pixels`: of the cropped image, uint8. `latents`: its encoding, the mode of the VAE's posterior before scaling,
    float16, with a column of its own for the flipped image. `mask`: the share of each latent's pixels that it covers,
    float16. `light`: an environment map, float32, height, width and channels. For a flipped image all but latents are
    mirrored when read."""
    shape: tuple[PositiveInt, ...]
    """Of one row."""


class LatentsManifest(Manifest):
    """Of `data/latents`."""

    VERSION, STAGE = 2, "precompute"

    format_version: Literal[2] = 2
    encoders_fingerprint: str
    fingerprint: str
    params: dict[str, Any]
    """The section `precompute` of the params it was made with."""
    seed: NonNegativeInt
    max_token_id: NonNegativeInt
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Channels, height and width of a latent."""
    conditions: dict[str, CachedCondition] = {}
    """What a method may see besides the caption, by name."""
    splits: Annotated[dict[str, list[Shard]], AfterValidator(_all_splits)]

    def num_rows(self, split: str) -> int:
        """Number of images in a split; 0 if there is no such split."""
        return sum(shard.num_rows for shard in self.splits.get(split, []))

    @property
    def reported_split(self) -> str:
        """The split that `evaluate` measures on: test, on which nothing is decided, where there is one."""
        return TEST if TEST in self.splits else "validation"


def check_base_files(base: Path) -> None:
    """Check that every file of the base is what the stage `base` wrote.

    Raises:
        InputError: names the file that is missing, changed or new.
    """
    try:
        check_files(base, BaseManifest.read(base).files, _NAME)
    except InputError as fault:
        raise InputError(f"{fault}; {_remedy(base, BaseManifest)}") from None


def check_latent_files(latents: Path) -> None:
    """Check that every shard of a latent cache is what was written, unless the cache is too large to hash.

    Raises:
        InputError: names the shard that is missing or changed.
    """
    shards = [shard for split in LatentsManifest.read(latents).splits.values() for shard in split]
    try:
        num_bytes = sum((latents / shard.file).stat().st_size for shard in shards)
        if num_bytes > _MAX_HASHED_BYTES:
            print(f"{latents}: {num_bytes / 2**30:.0f} GiB of shards: their headers are checked, their hashes aren't")
            return
        for shard in shards:
            check_hash(latents / shard.file, shard.sha256, _NAME)
    except InputError as fault:
        raise InputError(f"{fault}; {_remedy(latents, LatentsManifest)}") from None
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is missing; {_remedy(latents, LatentsManifest)}") from None


def encoders_fingerprint(base: Path) -> str:
    """SHA-256 of what a latent cache depends on: the VAE's and the tokenizer's files."""
    files = BaseManifest.read(base).files
    return sha256_json({name: digest for name, digest in files.items() if name.startswith(("vae/", "tokenizer/"))})


def _remedy(folder: Path, kind: type[Manifest]) -> str:
    return f"restore it with `dvc checkout {folder}`, or run `dvc repro --force --single-item {kind.STAGE}`"

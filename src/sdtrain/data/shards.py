"""The pipeline's two intermediate formats: dataset shards and latent shards.

`data/dataset/`: `{split}-{n:05}.parquet` with one row per image (columns `id`, `image`, `caption`,
`width`, `height`, and one for each condition: a file, of an image or in NumPy's .npy format of a light map, float32
[H, W, 3], all of one size), `inputs.csv` with one row for every input, and `manifest.json`.

`data/latents/`: `{split}-{n:05}.safetensors` with, for N images, `mean` and `logvar` of the VAE's
posterior before scaling, float16 [N, C, h, w], the same for the flipped image (`mean_flipped`,
`logvar_flipped`) where it is cached, and `input_ids` int64 [N, L]. Further columns are conditions, as `conditions` of
`manifest.json` lists them with their kind and shape:
- pixels (`hint`): uint8 [N, 1 or 3, H, W];
- latents (`foreground`, `background`, `relit_1`, `relit_2`): the mode of the VAE's posterior before scaling, float16
  [N, C, h, w], and where the image's flip is cached theirs, e.g. `foreground_flipped`;
- a `mask`: its mean over each latent's pixels, float16 [N, 1, h, w] in 0..1;
- light maps (`light`, `light_1`): linear, float32 [N, H, W, 3].

The images' ids, and in held-out shards their captions, are JSON lists under the keys `ids` and `captions` of the file's
metadata. `probe.safetensors` holds the `pixels` that the VAE got for the first validation images, float32
[up to 4, 3, H, W]: training encodes them again to check its VAE.
`manifest.json` has each shard's SHA-256.

`split` is `train`, `validation` or, where `dataset.test_fraction` asks for it, `test`; the last two are held out.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.ground import randomness
from sdtrain.ground.errors import InputError
from sdtrain.ground.manifests import DatasetManifest, DatasetSplit, LatentsManifest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

PROBE, NUM_PROBES = "probe.safetensors", 4

_AGAIN = "run `dvc repro --force --single-item precompute`"
_SHARD_BYTES = 256 * 2**20
_WIDTH = {"pixels": -1, "mask": -1, "light": -2}
"""The dimension along which a row's condition is mirrored, by kind."""
_BATCH_ROWS = 64
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("caption", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


class DatasetWriter:
    """Writes one split's images to parquet shards of about 256 MiB; buffers at most 64 rows."""

    def __init__(self, folder: Path, split: str, conditions: Sequence[str] = ()) -> None:
        self.folder, self.split = folder, split
        self._schema = pa.schema([*_SCHEMA, *((name, pa.binary()) for name in conditions)])
        self._images = ("image", *conditions)
        self.num_rows, self._num_shards, self._shard_bytes = 0, 0, 0
        self._rows: list[dict] = []
        self._file: pq.ParquetWriter | None = None
        self._hash = hashlib.sha256()

    def add(self, row: dict) -> None:
        """Append a row with the columns of the format."""
        self._rows.append(row)
        self._hash.update(f"{row['id']}\n".encode())
        self.num_rows += 1
        if len(self._rows) == _BATCH_ROWS:
            self._flush()

    def close(self) -> DatasetSplit:
        """Finish the last shard; the split's entry in the manifest."""
        self._flush()
        if self._file:
            self._file.close()
        return DatasetSplit(num_rows=self.num_rows, num_shards=self._num_shards, ids_sha256=self._hash.hexdigest())

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._file is None:
            path = self.folder / f"{self.split}-{self._num_shards:05}.parquet"
            self._file = pq.ParquetWriter(path, self._schema, compression="none")
            self._num_shards += 1
        self._file.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._shard_bytes += sum(len(row[name]) for row in self._rows for name in self._images)
        self._rows = []
        if self._shard_bytes >= _SHARD_BYTES:
            self._file.close()
            self._file, self._shard_bytes = None, 0


def read_dataset(folder: Path, split: str) -> Iterator[dict]:
    """Stream one split's rows in order."""
    for shard in range(DatasetManifest.read(folder).splits[split].num_shards):
        for batch in pq.ParquetFile(folder / f"{split}-{shard:05}.parquet").iter_batches(batch_size=_BATCH_ROWS):
            yield from batch.to_pylist()


@dataclass(frozen=True)
class Column:
    """A further column of the latent cache, by what a method needs of it."""

    shape: tuple[int, ...]
    """Of one row. Grey pixels are cached once and read as three channels."""
    flips: bool = False
    """Whether a flipped image has its own in the cache, `<name>_flipped`; others are mirrored instead."""
    dtype: Literal["float32", "uint8"] = "float32"
    """As it is read."""


class LatentShards:
    """One split of the latent cache, memory-mapped; rows are read by their index.

    Raises:
        InputError: the cache is missing, has another format, was made with another base model, or a shard of the split
            is missing, broken, or doesn't match the manifest.
    """

    def __init__(self, folder: Path, split: str, encoders_fingerprint: str) -> None:
        self.folder, self.manifest, self.split = folder, LatentsManifest.read(folder), split
        if self.manifest.encoders_fingerprint != encoders_fingerprint:
            raise InputError(
                f"{folder} was encoded by another base model (its VAE and tokenizer: "
                f"{self.manifest.encoders_fingerprint[:12]}, those of this base: {encoders_fingerprint[:12]}); "
                "run `dvc repro precompute`"
            )
        shards = self.manifest.splits[split]
        self._files = [_open(folder / shard.file) for shard in shards]
        self._starts = list(itertools.accumulate((shard.num_rows for shard in shards), initial=0))
        self._columns = frozenset(self._files[0].keys()) if shards else frozenset()
        self.has_flipped = bool(shards) and self.manifest.params.get("random_flip", False)
        for shard, file in zip(shards, self._files, strict=True):
            self._check(folder / shard.file, file, shard.num_rows)

    def _check(self, path: Path, file, num_rows: int) -> None:
        shapes = {name: condition.shape for name, condition in self.manifest.conditions.items()}
        latents = {"mean", "logvar", *(name for name in shapes if self._kind(name) == "latents")}
        shapes |= {"mean": self.manifest.shape, "logvar": self.manifest.shape}
        if self.has_flipped:
            shapes |= {f"{name}_flipped": shapes[name] for name in latents}
        expected = {name: [num_rows, *shape] for name, shape in shapes.items()}
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        for name, shape in {**expected, "input_ids": [num_rows, *found.get("input_ids", [0, 0])[1:]]}.items():
            if found.get(name) != shape:
                says = f"has shape {found[name]}" if name in found else "is missing"
                raise InputError(f"{path}: tensor {name} {says}, expected {shape} by manifest.json; {_AGAIN}")
        for name in ("ids",) if self.split == "train" else ("ids", "captions"):
            if name not in (file.metadata() or {}):
                raise InputError(f"{path}: the images' {name} are missing; {_AGAIN}")

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def ids(self) -> list[str]:
        """The images' ids, in order."""
        return [name for file in self._files for name in json.loads(file.metadata()["ids"])]

    @property
    def captions(self) -> list[str]:
        """The held-out images' captions, in order."""
        return [text for file in self._files for text in json.loads(file.metadata()["captions"])]

    def chosen(self, num: int) -> list[int]:
        """Up to `num` rows, by a hash of their ids, because a split's order is often by class; more keep the fewer."""
        ids = self.ids
        return sorted(range(len(ids)), key=lambda row: randomness.hash64(ids[row]))[:num]

    def check_columns(self, columns: dict[str, "Column"]) -> None:
        """Check that the cache holds these columns, and their flips where it holds the images', in these shapes.

        Raises:
            InputError: one is missing, or has another shape.
        """
        for name, column in columns.items():
            for stored in (name, f"{name}_flipped") if self.has_flipped and column.flips else (name,):
                if stored not in self._columns:
                    raise InputError(
                        f"{self.folder} has no column {stored!r}, which the training method needs; it has "
                        f"{', '.join(sorted(self._columns))}; run `dvc repro precompute` with the method's params"
                    )
                found = tuple(self._files[0].get_slice(stored).get_shape()[1:])
                found = (3, *found[1:]) if self._kind(name) == "pixels" else found
                if found != column.shape:
                    way = "run `dvc repro precompute` with the method's params"
                    if self._kind(name) == "light":
                        way = f"set method.light_size to {list(found[:2])}"
                    raise InputError(
                        f"{self.folder}: a row of column {stored!r} has shape {found}, the training method needs "
                        f"{column.shape}; {way}"
                    )

    def read(self, index: int, *names: str, flipped: bool = False) -> "dict[str, Tensor]":
        """The columns `names` of row `index`, floats as float32: e.g. `mean` [C, h, w], `input_ids` [L].

        Args:
            flipped: read the flipped image's encoding from the columns that have one; other conditions are mirrored.
        """
        shard = bisect.bisect_right(self._starts, index) - 1
        row, found = index - self._starts[shard], {}
        for name in names:
            flipped_name = f"{name}_flipped"
            stored = flipped_name if flipped and flipped_name in self._columns else name
            tensor = self._files[shard].get_slice(stored)[row]
            if flipped and self._kind(name) in _WIDTH:
                tensor = tensor.flip(_WIDTH[self._kind(name)])
            if self._kind(name) == "pixels":
                tensor = tensor.expand(3, -1, -1)
            found[name] = tensor.float() if tensor.is_floating_point() else tensor
        return found

    def _kind(self, name: str) -> str | None:
        """Of a condition; None of another column."""
        condition = self.manifest.conditions.get(name)
        return condition and condition.kind


def held_out_pictures(
    shards: LatentShards, names: Sequence[str], num: int
) -> "tuple[list[str], dict[str, list[Image.Image | Tensor]]]":
    """Captions of up to `num` held-out images, and their conditions `names`, one of each for every image.

    Those cached as pixels are images; others are float32 tensors as `LatentShards.read` has them.
    """
    rows, captions = shards.chosen(num), shards.captions
    read = [shards.read(row, *names) for row in rows]
    conditions = {name: [_as_image(row[name]) for row in read] for name in names}
    return [captions[row] for row in rows], conditions


def _as_image(values: "Tensor") -> "Image.Image | Tensor":
    from PIL import Image

    return values if values.is_floating_point() else Image.fromarray(values.permute(1, 2, 0).numpy())


def read_probe(folder: Path) -> "Tensor":
    """The pixels of the cache's probe images, float32 [up to NUM_PROBES, 3, H, W].

    Raises:
        InputError: the file is missing or broken.
    """
    with _open(folder / PROBE) as file:
        if "pixels" not in file.keys():  # noqa: SIM118
            raise InputError(f"{folder / PROBE}: tensor pixels is missing; {_AGAIN}")
        return file.get_tensor("pixels")


def _open(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        fault = "is missing" if isinstance(error, FileNotFoundError) else f"can't be read: {error}"
        raise InputError(f"{path} {fault}; {_AGAIN}") from None

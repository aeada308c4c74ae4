"""How many images there will be, and their bytes: counted if the stages have run, else as the source reports."""

import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from PIL import Image

from sdtrain.data.conditions import CONDITIONS
from sdtrain.data.sources import draw_scene, file_patterns
from sdtrain.ground.errors import InputError
from sdtrain.ground.manifests import SPLITS, TEST, DatasetManifest, LatentsManifest
from sdtrain.params.schema import DatasetParams
from sdtrain.tools.plan.base import TIMEOUT_S, asking_hub
from sdtrain.tools.plan.made import Made
from sdtrain.tools.plan.sizes import folder_bytes

_NUM_DRAWN = 16
"""Generated scenes that are drawn to estimate their files' size."""
_ROW_BYTES = 170
"""Of an image in data/dataset besides its file: id, caption, its row in inputs.csv."""


@dataclass(frozen=True)
class Images:
    """How many images there will be, and the bytes of data/dataset; None is unknown."""

    num_train: int | None
    num_validation: int | None
    num_test: int | None
    origin: str
    num_bytes: int | None
    bytes_origin: str

    @property
    def num_all(self) -> int | None:
        """All splits."""
        return None if self.num_train is None else self.num_train + self.num_validation + self.num_test


@dataclass(frozen=True)
class Found:
    """Number and bytes of a source's files or rows; None is unknown."""

    num_images: int | None
    num_bytes: int | None
    origin: str


def count_images(params: DatasetParams, seed: int, latents: Path, dataset: Path, made: Made) -> Images:
    """Count the images in the latent cache or data set, or else estimate them from the source."""
    if made.dataset:
        splits = DatasetManifest.read(dataset).splits
        counts = [splits[name].num_rows if name in splits else 0 for name in (*SPLITS, TEST)]
        origin = f"counted in {dataset}"
        num_bytes, bytes_origin = folder_bytes(dataset), origin
    else:
        found = ask_source(params, seed)
        counts, origin = split_counts(params, found.num_images), found.origin
        num_bytes, bytes_origin = _share_of_bytes(found, counts), found.origin
    if made.latents:
        manifest = LatentsManifest.read(latents)
        counts, origin = [manifest.num_rows(name) for name in (*SPLITS, TEST)], f"counted in {latents}"
    return Images(*counts, origin, num_bytes, bytes_origin)


def split_counts(params: DatasetParams, num_images: int | None) -> list[int | None]:
    """Estimate how many of a source's images are trained on, for validation, and for test, if none is dropped."""
    if num_images is None:
        return [None, None, None]
    fractions, limit = (params.validation_fraction, params.test_fraction), params.max_train_samples
    held_out = [round(num_images * fraction) for fraction in fractions]
    train = num_images - sum(held_out)
    if limit is not None and limit < train:  # reading stops there, for held-out images too
        num_read = limit / (1 - sum(fractions))
        return [limit, *(round(num_read * fraction) for fraction in fractions)]
    return [train, *held_out]


def _share_of_bytes(found: Found, counts: list[int | None]) -> int | None:
    if found.num_bytes is None or not found.num_images:
        return None
    return round(sum(counts) * (found.num_bytes / found.num_images + _ROW_BYTES))


def ask_source(params: DatasetParams, seed: int) -> Found:
    """What the source has, as far as is known without reading its images."""
    if params.source == "generated":
        sizes = [_scene_bytes(params, seed, index) for index in range(_NUM_DRAWN)]
        num_bytes = round(params.num_scenes * sum(sizes) / len(sizes))
        return Found(params.num_scenes, num_bytes, f"about, by dataset.num_scenes and {_NUM_DRAWN} scenes drawn")
    if params.source == "hub":
        return _ask_card(params)
    path = Path(params.path)
    count_files = partial(_count_files, params=params)
    count = {"imagefolder": count_files, "parquet": _count_rows, "webdataset": _count_members}[params.source]
    if not path.exists():
        return Found(None, None, f"dataset.path = '{path}' isn't there")
    try:
        return count(path)
    except (pa.ArrowException, tarfile.TarError, OSError) as error:
        return Found(None, None, f"dataset.path = '{path}' can't be read: {error}")


def _scene_bytes(params: DatasetParams, seed: int, index: int) -> int:
    """Size of what the source `generated` draws at `index`."""
    scene = draw_scene(params, seed, index)
    return len(scene.image) + sum(len(file.data) for file in scene.conditions.values())


def _count_files(path: Path, params: DatasetParams) -> Found:
    """Count the images; where metadata names files of conditions, too, one of each for an image."""
    patterns = file_patterns(params)
    Image.init()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    sizes = {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in path.rglob("*")
        if file.suffix.lower() in suffixes
    }
    images = [name for name in sizes if not any(pattern.matches(name) for pattern in patterns.values())]
    if not images:
        return Found(None, None, f"dataset.path = '{path}' has no images yet")
    pictures = [name for name in params.condition_columns if CONDITIONS[name].kind != "light" and name not in patterns]
    maps = [file for file in path.rglob("*") if file.suffix.lower() in (".npy", ".hdr")]
    num_bytes = sum(sizes.values()) + sum(file.stat().st_size for file in maps)
    return Found(round(len(images) / (1 + len(pictures))), num_bytes, f"about, the image files in {path}")


def _count_rows(path: Path) -> Found:
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        return Found(None, None, f"dataset.path = '{path}' has no .parquet files yet")
    num_rows = sum(pq.read_metadata(file).num_rows for file in files)
    return Found(num_rows, sum(file.stat().st_size for file in files), f"about, the rows in {path}")


def _count_members(path: Path) -> Found:
    """Count the samples of WebDataset tars: those of the first, and as many per byte in the others."""
    files = [path] if path.is_file() else sorted(path.rglob("*.tar"))
    if not files:
        return Found(None, None, f"dataset.path = '{path}' has no .tar files yet")
    with tarfile.open(files[0]) as tar:
        paths = [Path(member.name) for member in tar if member.isfile()]
    samples = {(path.parent, path.name.split(".")[0]) for path in paths}
    sizes = [file.stat().st_size for file in files]
    counted = f"the members of {path}" if len(files) == 1 else f"the first of {len(files)} tars in {path}"
    return Found(round(len(samples) * sum(sizes) / sizes[0]), sum(sizes), f"about, {counted}")


def _ask_card(params: DatasetParams) -> Found:
    """Read a hub data set's card, where `push_to_hub` of Datasets writes each split's number of rows and bytes."""
    instead = "set dataset.source: imagefolder and dataset.path to a folder on this machine, or use 'generated'"
    try:
        with asking_hub("dataset.repo", params.repo, params.revision, instead):
            info = HfApi().dataset_info(params.repo, revision=params.revision, timeout=TIMEOUT_S)
    except InputError as fault:
        return Found(None, None, str(fault))
    listed = info.card_data.to_dict().get("dataset_info", []) if info.card_data else []
    configs = [config for config in (listed if isinstance(listed, list) else [listed]) if isinstance(config, dict)]
    default = [config for config in configs if config.get("config_name") == "default"] or configs
    splits = default[0].get("splits", []) if len(default) == 1 else []
    for split in splits:
        if split.get("name") == params.split and isinstance(split.get("num_examples"), int):
            return Found(split["num_examples"], split.get("num_bytes"), f"about, the card of {params.repo} on the hub")
    return Found(None, None, f"the card of {params.repo} on the hub doesn't say")

"""Where captioned images come from: generated scenes, the hub, or files, read with Hugging Face Datasets.

A source yields candidates: images as undecoded bytes or paths, and captions as found. `dataset.py`
decides which of them are usable.
"""

import difflib
import glob
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.data import scenes
from sdtrain.ground import hub, randomness
from sdtrain.ground.errors import InputError
from sdtrain.params.schema import DatasetParams

if TYPE_CHECKING:
    import datasets

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
_HUB_CACHE = re.compile(r"/[^:]*/snapshots/[0-9a-f]{40}/")
"""Where the hub's client caches a repository's files; it differs between machines, so inputs' names leave it out."""

_CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
"""Files in which a data set on the hub describes itself."""


@dataclass(frozen=True)
class Candidate:
    """One input: its name in the source, the image's bytes or path, and the caption as found."""

    name: str
    image: bytes | str | None
    caption: Any


@dataclass(frozen=True)
class Source:
    """Where candidates come from: what to record, the order to read in, and how to read one."""

    record: dict
    order: Sequence[int]
    read: Callable[[int], Candidate]
    name: Callable[[int], str] = "row {}".format
    """A candidate's name, without reading it."""
    unlisted: Sequence[str] = ()
    """Names of images that the source's metadata doesn't list, or that Datasets doesn't read."""


def open_source(params: DatasetParams, seed: int, scratch: str) -> Source:
    """Open the source that the params name.

    Args:
        scratch: an empty folder for what Datasets caches while it reads; must outlive the source.

    Raises:
        InputError: the source isn't there, can't be read, or lacks a column.
    """
    if params.source == "generated":
        return Source({"generated": params.num_scenes}, range(params.num_scenes), partial(_draw_scene, params, seed))
    read = _from_hub if params.source == "hub" else _from_files
    record, table = read(params, scratch)
    source = Source(record, list(range(len(table))), _reader(table, params))
    if params.source == "imagefolder":
        source = _imagefolder(table, source, params)
    if params.max_train_samples is not None:
        shuffled = randomness.generator(seed, "max_train_samples").permutation(len(table))
        source = replace(source, order=[source.order[i] for i in shuffled])
    return source


def _draw_scene(params: DatasetParams, seed: int, index: int) -> Candidate:
    rng = randomness.generator(seed, "scene", index)
    scene = scenes.draw_scene(rng, new=bool(rng.random() < params.new_fraction))
    return Candidate(f"row {index}", scenes.png_bytes(scenes.render(scene, rng)), scenes.draw_caption(scene, rng))


def _from_hub(params: DatasetParams, scratch: str) -> tuple[dict, "datasets.Dataset"]:
    import datasets

    where = f"dataset.repo = {params.repo!r}"
    instead = "set dataset.source: imagefolder and dataset.path to a folder on this machine, or use 'generated'"
    faults = (datasets.exceptions.DatasetsError, datasets.data_files.EmptyDatasetError, ValueError, RuntimeError)
    faults += (zipfile.BadZipFile,)  # Datasets opens archives to find out what the data set is
    with hub.repository("dataset.repo", params.repo, params.revision, "dataset", instead) as source:
        source.fetch([name for name in _CARDS if name in source.files])
        try:
            builder = datasets.load_dataset_builder(params.repo, revision=source.commit, cache_dir=scratch)
            splits = builder.config.data_files
            if params.split not in splits:
                raise InputError(f"dataset.split = {params.split!r}: {params.repo} has {', '.join(splits)}")
            urls = sorted({str(url) for files in splits.values() for url in files})
            root = f"hf://datasets/{params.repo}@{source.commit}/"
            for url in urls:
                if not url.startswith(root):
                    fault = f"names files outside commit {source.commit}, which can't be checked: {url}"
                    raise InputError(f"{where}: {fault}; {instead}")
            source.fetch([url.removeprefix(root) for url in urls])
            builder.download_and_prepare()  # uses these files from the hub's cache, and no table from its own
            table = builder.as_dataset(split=params.split)
        except InputError:
            raise
        except faults as error:
            cause = " ".join(str(error.__cause__ or error).split()).rstrip(".")
            raise InputError(f"{where}: can't be read: {cause}; {instead}") from None
    record = {"repo": params.repo, "revision": params.revision, "commit": source.commit, "split": params.split}
    return record, table


def _from_files(params: DatasetParams, scratch: str) -> tuple[dict, "datasets.Dataset"]:
    """Read local files through a scratch cache, so that an earlier run's copy is never used."""
    import datasets

    path = Path(params.path)
    if not path.exists():
        raise InputError(f"dataset.path = '{path}': no such file or folder")
    datasets.disable_progress_bars()
    suffix = {"parquet": ".parquet", "webdataset": ".tar"}.get(params.source)
    # One named split, so that Datasets doesn't make a file called test.png a split of its own.
    files = [glob.escape(str(path.resolve())) + "/**"]
    if suffix is None and not any(p.suffix.lower() in _IMAGE_SUFFIXES for p in path.rglob("*")):
        raise InputError(f"dataset.path = '{path}': the folder has no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    if suffix is not None:
        files = [glob.escape(str(p)) for p in ([path] if path.is_file() else sorted(path.rglob(f"*{suffix}")))]
        if not files:
            raise InputError(f"dataset.path = '{path}': the folder has no {suffix} files")
    try:
        table = datasets.load_dataset(params.source, split="train", cache_dir=scratch, data_files={"train": files})
    except (datasets.exceptions.DatasetsError, ValueError, OSError, IndexError, tarfile.TarError) as error:
        cause = error.__cause__ or error
        raise InputError(f"dataset.path = '{path}': can't be read as {params.source}: {cause}") from None
    return {"path": str(path), "type": params.source}, table


def _reader(table: "datasets.Dataset", params: DatasetParams) -> Callable[[int], Candidate]:
    """A function from a row's number to its candidate, with the image left undecoded."""
    import datasets

    columns = table.column_names
    needed = {"image_column": params.image_column, "caption_column": params.caption_column}
    if params.source == "imagefolder" and params.caption_column not in columns:
        needed.pop("caption_column")  # a .txt file beside each image may hold it
    for key, name in needed.items():
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1, cutoff=0.0)
            raise InputError(
                f"dataset.{key} = {name!r}: no such column; there are {', '.join(columns)}"
                + (f"; nearest is {near[0]!r}" if near else "")
            )
    try:
        table = table.cast_column(params.image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"dataset.image_column = {params.image_column!r}: doesn't hold images: {error}") from None
    archive = lru_cache(maxsize=8)(zipfile.ZipFile)

    def candidate(index: int) -> Candidate:
        row = table[index]
        image = row[params.image_column] or {"bytes": None, "path": None}
        data, path = image["bytes"], image["path"]
        if not data and path and path.startswith("zip://"):  # zip://<member>::<archive>
            member, _, file = path.removeprefix("zip://").partition("::")
            try:
                data = archive(file).read(member)
            except zipfile.BadZipFile:
                data = b"damaged"  # so that it is dropped as undecodable
        name = f"row {index}" + (f" {_HUB_CACHE.sub('', path)}" if path else "")
        return Candidate(name, data or path, row.get(params.caption_column))

    return candidate


def _imagefolder(table: "datasets.Dataset", source: Source, params: DatasetParams) -> Source:
    """Adds captions from `.txt` files where the metadata has none, sorts by name, and lists unread images.

    Sorted, because Datasets reads several metadata files in the order of a set, which differs from run to run.
    """
    root = Path(params.path).resolve()
    has_captions = params.caption_column in table.column_names
    if not has_captions and not any(root.rglob("*.txt")):
        raise InputError(
            f"dataset.caption_column = {params.caption_column!r}: no such column in '{params.path}'; its metadata has "
            f"{', '.join(table.column_names)}, and there is no .txt file beside the images"
        )

    def named(index: int) -> Candidate:
        found = source.read(index)
        inside = isinstance(found.image, str) and Path(found.image).is_relative_to(root)
        return replace(found, name=str(Path(found.image).relative_to(root))) if inside else found

    def candidate(index: int) -> Candidate:
        found = named(index)
        if has_captions or not isinstance(found.image, str):
            return found
        text = Path(found.image).with_suffix(".txt")
        return replace(found, caption=text.read_text(encoding="utf-8", errors="replace") if text.exists() else None)

    keys = [(found.name, str(found.caption)) for found in map(named, range(len(table)))]
    images = {str(p.relative_to(root)) for p in root.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES}
    unlisted = sorted(images.difference(name for name, _ in keys))
    order = sorted(range(len(table)), key=keys.__getitem__)
    return replace(source, order=order, read=candidate, name=lambda index: keys[index][0], unlisted=unlisted)

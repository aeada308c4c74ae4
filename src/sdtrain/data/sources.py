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
from dataclasses import dataclass, field, replace
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
class Found:
    """A condition as found: its bytes or path, and its name in the source."""

    data: bytes | str | None
    name: str


@dataclass(frozen=True)
class Candidate:
    """One input: its name in the source, the image's bytes or path, and the caption as found."""

    name: str
    image: bytes | str | None
    caption: Any
    conditions: dict[str, Found] = field(default_factory=dict)
    group: Any = None
    """Inputs of one group stay in one split; None is a group of its own."""


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
        return _generated(params, seed)
    read = _from_hub if params.source == "hub" else _from_files
    record, table = read(params, scratch)
    source = Source(record, list(range(len(table))), _reader(table, params))
    if params.source == "imagefolder":
        source = _imagefolder(table, source, params)
    if params.max_train_samples is not None:
        shuffled = randomness.generator(seed, "max_train_samples").permutation(len(table))
        source = replace(source, order=[source.order[i] for i in shuffled])
    return source


def _generated(params: DatasetParams, seed: int) -> Source:
    for name, column in params.condition_columns.items():
        if column != "outline":
            raise InputError(f"dataset.condition_columns.{name} = {column!r}: no such column; 'generated' has outline")
    return Source(generated_record(params), range(params.num_scenes), partial(draw_candidate, params, seed))


def generated_record(params: DatasetParams) -> dict:
    """What the manifest records of the generated world."""
    record = {"generated": params.num_scenes}
    return (
        record if params.world == "shapes" else {**record, "world": params.world, "new_fraction": params.new_fraction}
    )


def draw_candidate(params: DatasetParams, seed: int, index: int) -> Candidate:
    """The scene at `index` of the generated world."""
    rng = randomness.generator(seed, "scene", index)
    scene = scenes.draw_scene(rng, new=bool(rng.random() < params.new_fraction))
    if params.world == "free_shapes":
        placement, caption = scenes.place_freely(rng), scenes.caption(scene, omit=("size", "position"))
    else:
        placement, caption = scenes.place(scene, rng), scenes.draw_caption(scene, rng)
    conditions = {
        name: Found(scenes.png_bytes(scenes.outline(scene, placement)), column)
        for name, column in params.condition_columns.items()
    }
    return Candidate(f"row {index}", scenes.png_bytes(scenes.render(scene, placement)), caption, conditions)


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
    conditions = {name: column for name, column in params.condition_columns.items() if not _is_pattern(column)}
    needed = {"image_column": params.image_column, "caption_column": params.caption_column}
    needed |= {f"condition_columns.{name}": column for name, column in conditions.items()}
    if params.group_column is not None:
        needed["group_column"] = params.group_column
    if params.source == "imagefolder" and params.caption_column not in columns:
        needed.pop("caption_column")  # a .txt file beside each image may hold it
    for key, name in needed.items():
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1, cutoff=0.0)
            raise InputError(
                f"dataset.{key} = {name!r}: no such column; there are {', '.join(columns)}"
                + (f"; nearest is {near[0]!r}" if near else "")
            )
    pictures = {"image_column": params.image_column}
    pictures |= {f"condition_columns.{name}": column for name, column in conditions.items()}
    for key, column in pictures.items():
        try:
            table = table.cast_column(column, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"dataset.{key} = {column!r}: doesn't hold images: {error}") from None
    archive = lru_cache(maxsize=8)(zipfile.ZipFile)

    def picture(image: dict | None) -> tuple[bytes | str | None, str | None]:
        """What there is of an image, and its path."""
        image = image or {"bytes": None, "path": None}
        data, path = image["bytes"], image["path"]
        if not data and path and path.startswith("zip://"):  # zip://<member>::<archive>
            member, _, file = path.removeprefix("zip://").partition("::")
            try:
                data = archive(file).read(member)
            except zipfile.BadZipFile:
                data = b"damaged"  # so that it is dropped as undecodable
        return data or path, path and _HUB_CACHE.sub("", path)

    def candidate(index: int) -> Candidate:
        row = table[index]
        image, path = picture(row[params.image_column])
        found = {name: (column, *picture(row[column])) for name, column in conditions.items()}
        return Candidate(
            f"row {index}" + (f" {path}" if path else ""),
            image,
            row.get(params.caption_column),
            {name: Found(data, path or (column if data else "")) for name, (column, data, path) in found.items()},
            row[params.group_column] if params.group_column is not None else None,
        )

    return candidate


def _is_pattern(column: str) -> bool:
    """Whether it names files beside the images instead of a column."""
    return "*" in column


def _imagefolder(table: "datasets.Dataset", source: Source, params: DatasetParams) -> Source:
    """Adds captions from `.txt` files where the metadata has none, sorts by name, and lists unread images.

    Sorted, because Datasets reads several metadata files in the order of a set, which differs from run to run.
    """
    root = Path(params.path).resolve()
    patterns = {name: column for name, column in params.condition_columns.items() if _is_pattern(column)}
    has_captions = params.caption_column in table.column_names
    if not has_captions and not any(root.rglob("*.txt")):
        raise InputError(
            f"dataset.caption_column = {params.caption_column!r}: no such column in '{params.path}'; its metadata has "
            f"{', '.join(table.column_names)}, and there is no .txt file beside the images"
        )

    def inside(path: str) -> str:
        return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else path

    def named(index: int) -> Candidate:
        found = source.read(index)
        return replace(found, name=inside(found.image)) if isinstance(found.image, str) else found

    def candidate(index: int) -> Candidate:
        found = named(index)
        conditions = {
            name: replace(given, name=inside(given.data)) if isinstance(given.data, str) else given
            for name, given in found.conditions.items()
        }
        for name, pattern in patterns.items():
            file = pattern.replace("*", str(Path(found.name).with_suffix("")), 1)
            conditions[name] = Found(str(root / file), file) if (root / file).is_file() else Found(None, "")
        found = replace(found, conditions=conditions)
        if has_captions or not isinstance(found.image, str):
            return found
        text = Path(found.image).with_suffix(".txt")
        return replace(found, caption=text.read_text(encoding="utf-8", errors="replace") if text.exists() else None)

    columns = [name for name in params.condition_columns if name not in patterns]
    keys, used = [], set()
    for found in map(named, range(len(table))):
        keys.append((found.name, str(found.caption)))
        used |= {inside(given.data) for given in (found.conditions[name] for name in columns) if given.data}
    matched = [re.compile(re.escape(pattern).replace(r"\*", "(.+)", 1)) for pattern in patterns.values()]
    images = {str(p.relative_to(root)) for p in root.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES}
    own = {name for name in images if any(pattern.fullmatch(name) for pattern in matched)}
    unlisted = sorted(images.difference(used, own, (name for name, _ in keys)))
    order = sorted((i for i in range(len(table)) if keys[i][0] not in own), key=keys.__getitem__)
    if keys and not order:
        raise InputError(
            f"dataset.condition_columns = {patterns}: matches every image in '{params.path}'; none is left to train on"
        )
    return replace(source, order=order, read=candidate, name=lambda index: keys[index][0], unlisted=unlisted)

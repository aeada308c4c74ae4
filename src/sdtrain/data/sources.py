"""Where captioned images come from: generated scenes, the hub, or files, read with Hugging Face Datasets.

A source yields candidates: images and their conditions as undecoded bytes or paths (light maps also as nested lists
of a table), and captions as found.
`dataset.py` decides which of them are usable.
"""

import difflib
import glob
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.data import lit_scenes, scenes
from sdtrain.data.conditions import CONDITIONS
from sdtrain.ground import hub, randomness
from sdtrain.ground.errors import InputError
from sdtrain.ground.manifests import LIT_WORLDS
from sdtrain.params.schema import DatasetParams

if TYPE_CHECKING:
    import datasets

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
_HUB_CACHE = re.compile(r"/[^:]*/snapshots/[0-9a-f]{40}/")
"""Where the hub's client caches a repository's files; it differs between machines, so inputs' names leave it out."""

_CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
"""Files in which a data set on the hub describes itself."""


@dataclass(frozen=True)
class File:
    """Undecoded bytes, a path, or a light map as nested lists; None where the source has none. And where in the source
    that is from."""

    data: bytes | str | list | None
    origin: str


@dataclass(frozen=True)
class Candidate:
    """One input: its name in the source, the image's bytes or path, the caption as found, and what belongs to them."""

    name: str
    image: bytes | str | None
    caption: Any
    conditions: dict[str, File] = field(default_factory=dict)
    group: Any = None
    """Candidates of an equal group stay in one split; None is no group."""


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


@dataclass(frozen=True)
class FilePattern:
    """Files beside an image folder's images, such as `hints/*.png`."""

    before: str
    after: str

    def beside(self, name: str) -> str:
        """The file that belongs to an image: * is the image's path without its suffix. Both relative to the folder."""
        return f"{self.before}{Path(name).with_suffix('')}{self.after}"

    def matches(self, name: str) -> bool:
        """Whether a file of the folder is one of these, and so no image of its own."""
        length = len(self.before) + len(self.after)
        return len(name) > length and name.startswith(self.before) and name.endswith(self.after)


def file_patterns(params: DatasetParams) -> dict[str, FilePattern]:
    """The conditions that are files beside an image folder's images.

    Raises:
        InputError: a pattern has more than one *, or leaves the folder.
    """
    if params.source != "imagefolder":
        return {}
    patterns = {}
    for name, text in params.condition_columns.items():
        if "*" not in text:
            continue
        path = os.path.normpath(text)
        if path.count("*") > 1 or os.path.isabs(path) or path.startswith(f"..{os.sep}"):
            raise InputError(
                f"dataset.condition_columns.{name} = {text!r}: expected files in dataset.path with one * for the "
                "image's path without its suffix, such as 'hints/*.png'"
            )
        patterns[name] = FilePattern(*path.split("*"))
    return patterns


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
        shuffled = randomness.generator(seed, "max_train_samples").permutation(len(source.order))
        source = replace(source, order=[source.order[i] for i in shuffled])
    return source


def generated_record(params: DatasetParams) -> dict:
    """What the manifest says of generated scenes."""
    record = {"generated": params.num_scenes}
    if params.world != "shapes":
        record["world"] = params.world
    if params.world != "shapes" or not params.new_fraction:
        record["new_fraction"] = params.new_fraction
    return record


def _generated(params: DatasetParams, seed: int) -> Source:
    columns = list(lit_scenes.COLUMNS if params.world in LIT_WORLDS else _DRAWN)
    for name, column in params.condition_columns.items():
        if column not in columns:
            raise InputError(_no_such_column(f"condition_columns.{name}", column, columns))
    return Source(generated_record(params), range(params.num_scenes), partial(draw_scene, params, seed))


_DRAWN = {"outline": scenes.outline}
"""Columns of the worlds of flat shapes besides image and caption."""


def draw_scene(params: DatasetParams, seed: int, index: int) -> Candidate:
    """The scene that the source `generated` has at `index`."""
    if params.world in LIT_WORLDS:
        return _draw_lit(params, seed, index)
    rng = randomness.generator(seed, "scene", index)
    scene, placement, caption = scenes.draw_example(params.world, params.new_fraction, rng)
    conditions = {
        name: File(scenes.png_bytes(_DRAWN[column](scene, placement)), column)
        for name, column in params.condition_columns.items()
    }
    return Candidate(f"row {index}", scenes.png_bytes(scenes.render(scene, placement)), caption, conditions)


def _draw_lit(params: DatasetParams, seed: int, index: int) -> Candidate:
    example = lit_scenes.draw_lit(seed, index)
    return Candidate(
        f"row {index}",
        scenes.png_bytes(lit_scenes.render(example.lit, example.light)),
        lit_scenes.caption(example.lit, example.light_name if params.world == "lit" else None),
        {name: File(lit_scenes.COLUMNS[column](example), column) for name, column in params.condition_columns.items()},
        example.group,
    )


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
            _check_file_names(table, where)
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
    _check_file_names(table, f"dataset.path = '{path}'")
    return {"path": str(path), "type": params.source}, table


def _reader(table: "datasets.Dataset", params: DatasetParams) -> Callable[[int], Candidate]:
    """A function from a row's number to its candidate, with the images left undecoded.

    Only the columns in use are read: Datasets would decode others, and fail where it can't.
    """
    patterns = file_patterns(params)
    conditions = {name: column for name, column in params.condition_columns.items() if name not in patterns}
    files = {"image_column": params.image_column}
    files |= {f"condition_columns.{name}": column for name, column in sorted(conditions.items())}
    values = {"caption_column": params.caption_column}
    if params.source == "imagefolder" and params.caption_column not in table.column_names:
        values = {}  # a .txt file beside each image may hold it
    if params.group_column is not None:
        values["group_column"] = params.group_column
    for key, name in (files | values).items():
        if name not in table.column_names:
            raise InputError(_no_such_column(key, name, table.column_names))
    _check_groups(table, params.group_column)
    table = table.select_columns(list(dict.fromkeys((files | values).values())))
    lights = {f"condition_columns.{name}" for name in conditions if CONDITIONS[name].kind == "light"}
    for key, name in files.items():
        if key not in lights or not _holds_lists(table, name):
            table = _undecoded(table, key, name, "light maps" if key in lights else "images")
    archive = lru_cache(maxsize=8)(zipfile.ZipFile)

    def file(row: dict, column: str) -> File:
        found = row[column] or {"bytes": None, "path": None}
        if isinstance(found, list):
            return File(found, "")
        data, path = found["bytes"], found["path"]
        if not data and path and path.startswith("zip://"):  # zip://<member>::<archive>
            member, _, name = path.removeprefix("zip://").partition("::")
            try:
                data = archive(name).read(member)
            except zipfile.BadZipFile:
                data = b"damaged"  # so that it is dropped as undecodable
        return File(data or path, _HUB_CACHE.sub("", path) if path else "")

    def candidate(index: int) -> Candidate:
        row = table[index]
        image = file(row, params.image_column)
        others = {name: file(row, column) for name, column in conditions.items()}
        return Candidate(
            f"row {index}" + (f" {image.origin}" if image.origin else ""),
            image.data,
            row.get(params.caption_column),
            {n: replace(f, origin=conditions[n]) if f.data and not f.origin else f for n, f in others.items()},
            _group(row.get(params.group_column)),
        )

    return candidate


def _no_such_column(key: str, name: str, columns: list[str]) -> str:
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.0)
    fault = f"dataset.{key} = {name!r}: no such column; there are {', '.join(columns)}"
    return fault + (f"; nearest is {near[0]!r}" if near else "")


def _holds_lists(table: "datasets.Dataset", column: str) -> bool:
    """Of lists, as Datasets reads nested numbers, and the .npy members of WebDataset tars."""
    import datasets

    return isinstance(table.features[column], datasets.List | datasets.LargeList | datasets.Array3D)


def _undecoded(table: "datasets.Dataset", key: str, column: str, what: str) -> "datasets.Dataset":
    import datasets

    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"dataset.{key} = {column!r}: doesn't hold {what}: {error}") from None


def _check_groups(table: "datasets.Dataset", column: str | None) -> None:
    import datasets

    if column is not None and not isinstance(table.features[column], datasets.Value | datasets.ClassLabel):
        raise InputError(f"dataset.group_column = {column!r}: doesn't hold texts or numbers: {table.features[column]}")


def _group(value: Any) -> Any:
    """None for a float that isn't a number, which is how a table may hold no value."""
    return value if value == value else None


def _check_file_names(table: "datasets.Dataset", where: str) -> None:
    """Datasets gives what metadata calls `file_name` to its first column of files, which should be `image`.

    Raises:
        InputError: another column got the images.
    """
    import datasets

    if table.info.builder_name != "imagefolder":
        return
    columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if "image" in columns[1:] and len(table) and table.data.column("image").null_count == len(table):
        raise InputError(f"{where}: file_name must stand before {columns[0]}_file_name in the metadata")


def _imagefolder(table: "datasets.Dataset", source: Source, params: DatasetParams) -> Source:
    """Adds captions from `.txt` files where the metadata has none, sorts by name, and lists unread images.

    Sorted, because Datasets reads several metadata files in the order of a set, which differs from run to run.
    Files of conditions are no images of their own.
    """
    root, patterns = Path(params.path).resolve(), file_patterns(params)
    has_captions = params.caption_column in table.column_names
    if not has_captions and not any(root.rglob("*.txt")):
        raise InputError(
            f"dataset.caption_column = {params.caption_column!r}: no such column in '{params.path}'; its metadata has "
            f"{', '.join(table.column_names)}, and there is no .txt file beside the images"
        )

    def inside(path: bytes | str | list | None) -> str | None:
        return str(Path(path).relative_to(root)) if isinstance(path, str) and Path(path).is_relative_to(root) else None

    def named(index: int) -> Candidate:
        found = source.read(index)
        name, conditions = inside(found.image), found.conditions
        conditions = {key: replace(file, origin=inside(file.data) or file.origin) for key, file in conditions.items()}
        for key, pattern in patterns.items():
            beside = pattern.beside(name) if name else ""
            conditions[key] = File(str(root / beside) if name else None, beside)
        return replace(found, name=name or found.name, conditions=conditions)

    def candidate(index: int) -> Candidate:
        found = named(index)
        if has_captions or not isinstance(found.image, str):
            return found
        text = Path(found.image).with_suffix(".txt")
        return replace(found, caption=text.read_text(encoding="utf-8", errors="replace") if text.exists() else None)

    def is_condition(name: str) -> bool:
        return any(pattern.matches(name) for pattern in patterns.values())

    keys, listed = [], set()
    for index in range(len(table)):
        found = named(index)
        keys.append((found.name, str(found.caption)))
        listed |= {found.name, *(file.origin for file in found.conditions.values())}
    images = {str(p.relative_to(root)) for p in root.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES}
    unlisted = sorted(name for name in images - listed if not is_condition(name))
    order = sorted((index for index in range(len(table)) if not is_condition(keys[index][0])), key=keys.__getitem__)
    return replace(source, order=order, read=candidate, name=lambda index: keys[index][0], unlisted=unlisted)

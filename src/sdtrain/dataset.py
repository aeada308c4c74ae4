"""The data gate: every input is read once, kept or dropped, and accounted for.

Pictures come from generated scenes or through Hugging Face Datasets, as undecoded bytes or paths.
Each is decoded wholly, made plain RGB, and written to the shards of `shards.py`. `inputs.csv` has a
row for every input with what became of it; `manifest.json` counts the reasons.
"""

import csv
import difflib
import hashlib
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sdtrain import hub, randomness, scenes
from sdtrain.errors import InputError
from sdtrain.files import new_folder, sha256_json, write_json
from sdtrain.images import BadPicture, clean_picture
from sdtrain.manifests import FORMATS
from sdtrain.params import DatasetParams
from sdtrain.shards import SPLITS, DatasetWriter

if TYPE_CHECKING:
    import datasets

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


@dataclass(frozen=True)
class Source:
    """Where candidates come from: what to record, the order to read in, and how to read one."""

    record: dict
    order: Sequence[int]
    read: Callable[[int], "Candidate"]
    unlisted: Sequence[str] = ()
    """Names of pictures that the source's metadata doesn't list."""


@dataclass(frozen=True)
class Candidate:
    """One input: its name in the source, the picture's bytes or path, and the caption as found."""

    name: str
    picture: bytes | str | None
    caption: Any


def build_dataset(params: DatasetParams, seed: int, out: Path, metrics: Path) -> None:
    """Read the source, write the shards to `out` and the counts to `metrics`.

    Raises:
        InputError: the source can't be read, lacks a column, or leaves a split without pictures.
    """
    with new_folder(out) as folder, tempfile.TemporaryDirectory() as scratch:
        source = _open_source(params, seed, scratch)
        writers = {split: DatasetWriter(folder, split) for split in SPLITS}
        outcomes = Counter()
        with (folder / "inputs.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["input", "outcome", "reason", "id"])
            num_read = 0
            progress = tqdm(total=len(source.order), desc="dataset", unit="picture", disable=None)
            for candidate, row in _checked(map(source.read, source.order), params):
                num_read += 1
                progress.update()
                if isinstance(row, str):
                    table.writerow([candidate.name, "dropped", row, ""])
                    outcomes[row.split(":")[0]] += 1
                    continue
                # By pixels alone: copies stay on one side, and every seed holds out the same pictures.
                held_out = randomness.uniform(0, "split", randomness.hash64(row.pop("pixels_sha256")))
                split = "validation" if held_out < params.validation_fraction else "train"
                writers[split].add(row)
                table.writerow([candidate.name, split, "", row["id"]])
                if writers["train"].num_rows == params.max_train_samples:
                    break
            unread = [(f"row {index}", "beyond max_train_samples") for index in source.order[num_read:]]
            for name, reason in [*unread, *((name, "not listed in the metadata") for name in source.unlisted)]:
                table.writerow([name, "dropped", reason, ""])
                outcomes[reason] += 1
            progress.close()
        splits = {split: writer.close() for split, writer in writers.items()}
        reasons = dict(sorted(outcomes.items()))
        _must_have_pictures(splits, reasons, params)
        manifest = {
            "format_version": FORMATS["dataset"],
            "source": source.record,
            "splits": splits,
            "dropped": reasons,
            "fingerprint": sha256_json([FORMATS["dataset"], splits]),
        }
        write_json(folder / "manifest.json", manifest)
        counts = {f"num_{split}": splits[split]["num_rows"] for split in SPLITS}
        counts["num_dropped"] = sum(reasons.values())
        write_json(metrics, {"num_inputs": sum(counts.values()), **counts})
    print(
        f"{sum(counts.values())} inputs: {counts['num_train']} train, {counts['num_validation']} held out, "
        f"{counts['num_dropped']} dropped {reasons or ''}"
    )


def _must_have_pictures(splits: dict, reasons: dict, params: DatasetParams) -> None:
    kept = sum(split["num_rows"] for split in splits.values())
    if not kept:
        raise InputError(f"dataset.source = '{params.source}': no usable picture; dropped: {reasons or 'none found'}")
    for split in SPLITS:
        if not splits[split]["num_rows"]:
            way = "raise" if split == "validation" else "lower"
            raise InputError(
                f"dataset.validation_fraction = {params.validation_fraction}: leaves no {split} picture "
                f"of {kept}; {way} it, or add pictures"
            )


def _checked(candidates: Iterable[Candidate], params: DatasetParams) -> Iterator[tuple[Candidate, dict | str]]:
    """Each candidate in order, with its row or the reason why it has none."""
    if params.num_workers == 0:
        for candidate in candidates:
            yield candidate, _check(candidate, params.alpha_background)
        return
    with ThreadPoolExecutor(params.num_workers) as pool:
        pending = deque()
        for candidate in candidates:
            pending.append((candidate, pool.submit(_check, candidate, params.alpha_background)))
            if len(pending) > 4 * params.num_workers:
                first, row = pending.popleft()
                yield first, row.result()
        for candidate, row in pending:
            yield candidate, row.result()


def _check(candidate: Candidate, background: str) -> dict | str:
    if not isinstance(candidate.caption, str):
        return "caption is missing" if candidate.caption is None else "caption is not text"
    caption = " ".join(candidate.caption.split())
    if not caption:
        return "caption is empty"
    if candidate.picture is None:
        return "picture is missing"
    try:
        data, picture = clean_picture(candidate.picture, background)
    except BadPicture as fault:
        return str(fault)
    pixels = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
    return {
        "id": hashlib.sha256(f"{pixels} {caption}".encode()).hexdigest()[:32],
        "pixels_sha256": pixels,
        "image": data,
        "caption": caption,
        "width": picture.width,
        "height": picture.height,
    }


def _open_source(params: DatasetParams, seed: int, scratch: str) -> Source:
    if params.source == "generated":
        return Source({"generated": params.num_scenes}, range(params.num_scenes), partial(_draw_scene, params, seed))
    record, table = _from_hub(params) if params.source == "hub" else _from_files(params, scratch)
    read, unlisted = _reader(table, params), []
    if params.source == "imagefolder":
        read, unlisted = _imagefolder(table, read, params)
    order: Sequence[int] = range(len(table))
    if params.max_train_samples is not None:
        order = randomness.generator(seed, "max_train_samples").permutation(len(table)).tolist()
    return Source(record, order, read, unlisted)


def _draw_scene(params: DatasetParams, seed: int, index: int) -> Candidate:
    rng = randomness.generator(seed, "scene", index)
    scene = scenes.draw_scene(rng, new=bool(rng.random() < params.new_fraction))
    return Candidate(f"row {index}", scenes.png_bytes(scenes.render(scene, rng)), scenes.draw_caption(scene, rng))


def _from_hub(params: DatasetParams) -> tuple[dict, "datasets.Dataset"]:
    import datasets
    from huggingface_hub import HfApi

    instead = "set dataset.source: imagefolder and dataset.path to a folder on this machine, or use 'generated'"
    with hub.explained("dataset.repo", params.repo, params.revision, instead):
        commit = HfApi().dataset_info(params.repo, revision=params.revision).sha
        try:
            splits = datasets.get_dataset_split_names(params.repo, revision=commit)
            if params.split not in splits:
                raise InputError(f"dataset.split = {params.split!r}: {params.repo} has {', '.join(splits)}")
            table = datasets.load_dataset(params.repo, revision=commit, split=params.split)
        except (datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DataFilesNotFoundError) as error:
            raise InputError(f"dataset.repo = {params.repo!r}: {error}") from None
    print(f"dataset.repo: {params.repo} at {params.revision or 'its newest revision'} is commit {commit}")
    return {"repo": params.repo, "revision": params.revision, "commit": commit, "split": params.split}, table


def _from_files(params: DatasetParams, scratch: str) -> tuple[dict, "datasets.Dataset"]:
    """Read local files through a scratch cache, so that no earlier run's copy is ever used."""
    import datasets

    path = Path(params.path)
    if not path.exists():
        raise InputError(f"dataset.path = '{path}': no such file or folder")
    datasets.disable_progress_bars()
    suffix = {"parquet": ".parquet", "webdataset": ".tar"}.get(params.source)
    options: dict[str, Any] = {"data_dir": str(path)}
    if suffix is None and not any(p.suffix.lower() in _PICTURES for p in path.rglob("*")):
        raise InputError(f"dataset.path = '{path}': the folder has no pictures ({', '.join(sorted(_PICTURES))})")
    if suffix is not None:
        files = [str(path)] if path.is_file() else sorted(str(p) for p in path.rglob(f"*{suffix}"))
        if not files:
            raise InputError(f"dataset.path = '{path}': the folder has no {suffix} files")
        options = {"data_files": files}
    try:
        table = datasets.load_dataset(params.source, split="train", cache_dir=scratch, **options)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise InputError(f"dataset.path = '{path}': can't be read as {params.source}: {cause}") from None
    return {"path": str(path), "type": params.source}, table


def _reader(table: "datasets.Dataset", params: DatasetParams) -> Callable[[int], Candidate]:
    """A function from a row's number to its candidate, with the picture left undecoded."""
    import datasets

    columns = table.column_names
    needed = {"image_column": params.image_column, "caption_column": params.caption_column}
    if params.source == "imagefolder" and params.caption_column not in columns:
        needed.pop("caption_column")  # a .txt file beside each picture may hold it
    for key, name in needed.items():
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1, cutoff=0.0)
            raise InputError(
                f"dataset.{key} = {name!r}: no such column; there are {', '.join(columns)}"
                + (f"; nearest is {near[0]!r}" if near else "")
            )
    if not isinstance(table.features[params.image_column], datasets.Image):
        try:
            table = table.cast_column(params.image_column, datasets.Image(decode=False))
        except (TypeError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise InputError(
                f"dataset.image_column = {params.image_column!r}: doesn't hold pictures: {error}"
            ) from None
    table = table.cast_column(params.image_column, datasets.Image(decode=False))

    def candidate(index: int) -> Candidate:
        row = table[index]
        picture = row[params.image_column] or {"bytes": None, "path": None}
        name = f"row {index}" + (f" {picture['path']}" if picture["path"] else "")
        return Candidate(name, picture["bytes"] or picture["path"], row.get(params.caption_column))

    return candidate


def _imagefolder(
    table: "datasets.Dataset", read: Callable[[int], Candidate], params: DatasetParams
) -> tuple[Callable[[int], Candidate], list[str]]:
    """Captions from `.txt` files where the metadata has none, and the pictures the metadata leaves out."""
    root = Path(params.path)
    has_captions = params.caption_column in table.column_names
    if not has_captions and not any(root.rglob("*.txt")):
        raise InputError(
            f"dataset.caption_column = {params.caption_column!r}: no such column in '{root}'; its metadata has "
            f"{', '.join(table.column_names)}, and no .txt file lies beside the pictures"
        )

    def candidate(index: int) -> Candidate:
        found = read(index)
        path = Path(found.picture) if isinstance(found.picture, str) else None
        caption = found.caption
        if not has_captions and path:
            text = path.with_suffix(".txt")
            caption = text.read_text(encoding="utf-8", errors="replace") if text.exists() else None
        name = str(path.relative_to(root.resolve())) if path and path.is_relative_to(root.resolve()) else found.name
        return Candidate(name, found.picture, caption)

    listed = {candidate(index).name for index in range(len(table))} if has_captions else None
    pictures = sorted(p for p in root.rglob("*") if p.suffix.lower() in _PICTURES)
    unlisted = [n for p in pictures if (n := str(p.relative_to(root))) not in listed] if listed is not None else []
    return candidate, unlisted

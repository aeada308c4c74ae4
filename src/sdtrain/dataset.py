"""The data gate: every input is read once, then kept or dropped, and recorded.

Each candidate of `sources.py` is decoded completely, made plain RGB, and written to the shards of
`shards.py`, together with its conditions. `inputs.csv` has a row for every input with its outcome, and where
each condition is from; `manifest.json` counts the reasons for dropping, and the notes on images that were
kept although something was wrong with them.
"""

import csv
import hashlib
import re
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from sdtrain.data.conditions import CONDITIONS, Cleaned, check_light_part
from sdtrain.data.images import DAMAGED_EXIF, BadImage, clean_image
from sdtrain.data.shards import DatasetWriter
from sdtrain.data.sources import Candidate, open_source
from sdtrain.ground import randomness
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import PARTIAL, new_folder, sha256_json, write_json
from sdtrain.ground.manifests import SPLITS, TEST, DatasetCondition, DatasetLight, DatasetManifest, DatasetSplit
from sdtrain.params.schema import DatasetParams


@dataclass(frozen=True)
class Kept:
    """What a candidate that is kept brings to the data set."""

    row: dict
    """By the columns of its shard."""
    group: str
    """By which its split is drawn."""
    conditions: dict[str, Cleaned]
    notes: list[str]


def build_dataset(params: DatasetParams, seed: int, out: Path, metrics: Path) -> None:
    """Read the source, write the shards to `out` and the counts to `metrics`.

    Raises:
        InputError: the source can't be read, lacks a column, or leaves a split without images; or there
            isn't enough memory to decode an image.
    """
    with new_folder(out) as folder, _scratch_folder(out) as scratch:
        source = open_source(params, seed, scratch)
        conditions = dict.fromkeys(sorted(params.condition_columns), 0)  # most channels of a row, or the maps' shape
        names = [*SPLITS, TEST] if params.test_fraction else SPLITS
        writers = {split: DatasetWriter(folder, split, list(conditions)) for split in names}
        outcomes, notes = Counter(), Counter()
        # A file's name can be any bytes, not only valid text.
        with (folder / "inputs.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            table = csv.writer(file)
            table.writerow(["input", "outcome", "reason", "id", *conditions])
            num_read = 0
            progress = tqdm(total=len(source.order), desc="dataset", unit="image", disable=None)
            for candidate, found in _checked(map(source.read, source.order), params):
                num_read += 1
                progress.update()
                found = found if isinstance(found, str) else _of_one_shape(found, conditions)
                origins = [candidate.conditions[name].origin for name in conditions]
                if isinstance(found, str):
                    table.writerow([candidate.name, "dropped", found, "", *origins])
                    outcomes[found.split(":")[0]] += 1
                    continue
                split = _split_of(found.group, params)
                notes.update(note.split(":")[0] for note in found.notes)
                for name, cleaned in found.conditions.items():
                    conditions[name] = cleaned.map_shape or max(conditions[name], cleaned.channels)
                writers[split].add(found.row)
                table.writerow([candidate.name, split, "; ".join(found.notes), found.row["id"], *origins])
                if writers["train"].num_rows == params.max_train_samples:
                    break
            unread = [(source.name(index), "beyond max_train_samples") for index in source.order[num_read:]]
            unread += [(name, "not listed in the metadata, hidden, or of an unknown type") for name in source.unlisted]
            for name, reason in unread:
                table.writerow([name, "dropped", reason, "", *("" for _ in conditions)])
                outcomes[reason] += 1
            progress.close()
        splits = {split: writer.close() for split, writer in writers.items()}
        reasons = dict(sorted(outcomes.items()))
        _must_have_images(splits, reasons, params)
        told = [DatasetManifest.VERSION, {name: split.model_dump() for name, split in splits.items()}]
        manifest = DatasetManifest(
            source=source.record,
            conditions={
                name: DatasetCondition(channels=form) if isinstance(form, int) else DatasetLight(shape=form)
                for name, form in conditions.items()
            },
            splits=splits,
            dropped=reasons,
            noted=dict(sorted(notes.items())),
            fingerprint=sha256_json([*told, conditions] if conditions else told),
        )
        manifest.write(folder)
        counts = {f"num_{name}": split.num_rows for name, split in splits.items()}
        counts["num_dropped"] = sum(reasons.values())
        counts = {"num_inputs": sum(counts.values()), **counts, "num_damaged_exif": notes[DAMAGED_EXIF]}
        write_json(metrics, counts)
    print(
        f"{counts['num_inputs']} inputs: {', '.join(f'{split.num_rows} {name}' for name, split in splits.items())}, "
        f"{counts['num_dropped']} dropped {reasons or ''}"
        + (f"; kept with a note: {manifest.noted}, see {out / 'inputs.csv'}" if notes else "")
    )


def _split_of(group: str, params: DatasetParams) -> str:
    """Drawn by pixels or group alone, so that copies stay in one split, and every seed holds out the same images.

    Validation takes the lowest draws and test the highest, so that neither fraction moves the other's images.
    """
    drawn = randomness.uniform(0, "split", randomness.hash64(group))
    if drawn < params.validation_fraction:
        return "validation"
    return TEST if drawn >= 1 - params.test_fraction else "train"


@contextmanager
def _scratch_folder(out: Path) -> Iterator[str]:
    """An empty folder beside `out`, deleted at the end.

    What a killed run left behind is deleted first, also under the random names of earlier versions.
    """
    scratch = out.with_name(f"{out.name}.scratch{PARTIAL}")
    left = [path for path in out.parent.glob(f"tmp*{PARTIAL}") if re.fullmatch("tmp[a-z0-9_]{8}", path.stem)]
    for folder in [scratch, *left]:
        shutil.rmtree(folder, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield str(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _must_have_images(splits: dict[str, DatasetSplit], reasons: dict, params: DatasetParams) -> None:
    kept = sum(split.num_rows for split in splits.values())
    if not kept:
        raise InputError(f"dataset.source = '{params.source}': no usable image; dropped: {reasons or 'none found'}")
    validation = f"dataset.validation_fraction = {params.validation_fraction}"
    test = f"dataset.test_fraction = {params.test_fraction}"
    both, lower = (f"{validation}, {test}: leave", "one") if TEST in splits else (f"{validation}: leaves", "it")
    faults = {
        "train": f"{both} no train image of {kept}; lower {lower}",
        "validation": f"{validation}: leaves no validation image of {kept}; raise it",
        TEST: f"{test}: leaves no test image of {kept}; raise it, set it to 0",
    }
    for name, split in splits.items():
        if not split.num_rows:
            raise InputError(f"{faults[name]}, or add images")


def _checked(candidates: Iterable[Candidate], params: DatasetParams) -> Iterator[tuple[Candidate, Kept | str]]:
    """Each candidate in order, with what it brings or the reason why it is dropped."""
    if params.num_workers == 0:
        for candidate in candidates:
            yield candidate, _check(candidate, params.alpha_background)
        return
    with ThreadPoolExecutor(params.num_workers) as pool:
        pending = deque()
        for candidate in candidates:
            pending.append((candidate, pool.submit(_check, candidate, params.alpha_background)))
            if len(pending) > 4 * params.num_workers:
                first, found = pending.popleft()
                yield first, found.result()
        for candidate, found in pending:
            yield candidate, found.result()


def _of_one_shape(found: Kept, conditions: dict[str, int | tuple[int, ...]]) -> Kept | str:
    """A row as it is, or why it is dropped: all maps of a light have the shape of the first that is kept."""
    for name, cleaned in found.conditions.items():
        if cleaned.map_shape and conditions[name] not in (0, cleaned.map_shape):
            here, first = ("x".join(map(str, shape)) for shape in (cleaned.map_shape, conditions[name]))
            return f"{name} shape differs: {here}, first row {first}"
    return found


def _check(candidate: Candidate, background: str) -> Kept | str:
    if not isinstance(candidate.caption, str):
        return "caption is missing" if candidate.caption is None else "caption is not text"
    caption = " ".join(candidate.caption.split())
    if not caption:
        return "caption is empty"
    if candidate.image is None:
        return "image is missing"
    part = "image"
    try:
        data, image, note = clean_image(candidate.image, background)
        conditions = {}
        for part, file in sorted(candidate.conditions.items()):
            if file.data is None:
                return f"{part} is missing"
            conditions[part] = CONDITIONS[part].clean(file.data, image.size)
        if {"light", "light_1"} <= conditions.keys():
            part = "light_1"
            check_light_part(conditions["light"].data, conditions[part].data)
    except BadImage as fault:
        return str(fault) if part == "image" else f"{part} {fault}"
    except MemoryError:  # not dropped: another machine would keep it
        raise InputError(
            f"{candidate.name}: not enough memory to decode this {part}; lower dataset.num_workers, "
            "or remove the image from the source"
        ) from None
    pixels = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    identity = f"{pixels} {caption}" + "".join(f"\n{name} {found.sha256}" for name, found in conditions.items())
    row = {
        "id": hashlib.sha256(identity.encode()).hexdigest()[:32],
        "image": data,
        "caption": caption,
        "width": image.width,
        "height": image.height,
    }
    notes = [note] + [found.note and f"{name} {found.note}" for name, found in conditions.items()]
    return Kept(
        row | {name: found.data for name, found in conditions.items()},
        pixels if candidate.group is None else str(candidate.group),
        conditions,
        [note for note in notes if note],
    )

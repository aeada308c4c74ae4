"""The matrix of samples: what models were asked × runs, the base first, what changed most at the top.

Rows are matched between runs by what was asked. Models that were asked the same started from the same noise.
"""

from dataclasses import dataclass

from sdtrain.ground.errors import InputError
from sdtrain.ground.samples import LIST, DrawnImage, GivenImage, Samples, scale_text
from sdtrain.tools.report.recorded import SAMPLES, Recorded
from sdtrain.tools.report.thumbnails import Gallery, Picture

BASE, TRAINED = "base", "trained"

Column = tuple[int, str]
"""A run's number and a model of it."""


@dataclass
class Row:
    """Images that were asked for the same."""

    text: str
    facts: list[str]
    """What else was asked, in words."""
    scale: str
    """The guidance scale."""
    given: dict[str, Picture]
    """What the models saw, and the truth, by name."""
    cells: list[Picture | None]
    """In the order of the matrix's columns."""
    change: float | None
    """Mean absolute difference of the pixels between base and trained, 0 to 1, over runs."""


@dataclass
class Matrix:
    """What was asked × models, the base first; what changed most comes first."""

    columns: list[str]
    rows: list[Row]
    scales: list[str]
    """All guidance scales, the grid's first."""


def sample_matrix(runs: list[Recorded], gallery: Gallery) -> tuple[Matrix, list[tuple[str, str]]]:
    """The matrix of all runs; and runs that lack images, with the reason."""
    asked: dict[tuple, dict[Column, Picture]] = {}
    given: dict[tuple, dict[str, Picture]] = {}
    columns: dict[Column, None] = {}
    notes = []
    for number, run in enumerate(runs):
        folder = run.outs[SAMPLES]
        try:
            samples = Samples.parse(folder.json(LIST), f"{SAMPLES}/{LIST}")
        except InputError as fault:
            notes.append((run.name, str(fault)))
            continue
        for entry in samples.drawn:
            if picture := gallery.find(folder, entry.file):
                asked.setdefault(_key(entry), {})[number, entry.model] = picture
                columns[number, entry.model] = None
        for entry in samples.given:
            if picture := gallery.find(folder, entry.file):
                given.setdefault(_subject(entry), {})[entry.name] = picture
        if folder.missing:
            notes.append((run.name, folder.missing))
    shown = _merge_bases(columns, asked, [run.name for run in runs])
    rows = [_row(key, cells, given, shown, gallery) for key, cells in asked.items()]
    rows.sort(key=lambda row: -1 if row.change is None else row.change, reverse=True)
    return Matrix(list(shown.values()), rows, list(dict.fromkeys(scale_text(key[-1]) for key in asked))), notes


def _subject(entry: DrawnImage | GivenImage) -> tuple:
    return entry.text, entry.item, entry.light


def _key(entry: DrawnImage) -> tuple:
    return (*_subject(entry), entry.seed, entry.guidance_scale)


def _row(
    key: tuple,
    cells: dict[Column, Picture],
    given: dict[tuple, dict[str, Picture]],
    shown: dict[Column, str],
    gallery: Gallery,
) -> Row:
    text, item, light, seed, scale = key
    facts = [f"seed {seed}", f"guidance {scale_text(scale)}", *([f"{light} light"] if light else [])]
    seen = given.get((text, item, None), {}) | (given.get((text, item, light), {}) if light else {})
    pairs = [(cells.get((number, BASE)), picture) for (number, model), picture in cells.items() if model == TRAINED]
    changes = [gallery.difference(base, picture) for base, picture in pairs if base]
    changes = [change for change in changes if change is not None]
    return Row(
        text,
        [*([item] if item else []), *facts],
        scale_text(scale),
        seen,
        [cells.get(column) for column in shown],
        sum(changes) / len(changes) if changes else None,
    )


def _merge_bases(
    columns: dict[Column, None], asked: dict[tuple, dict[Column, Picture]], names: list[str]
) -> dict[Column, str]:
    """The columns with their heads: bases first, those with equal images as one; then each run's models."""
    bases = [column for column in columns if column[1] == BASE]
    groups: list[Column] = []
    for column in bases:
        twin = next((other for other in groups if _agree(column, other, asked)), None)
        if twin is None:
            groups.append(column)
            continue
        for cells in asked.values():  # of rows that only one of them has
            if column in cells:
                cells.setdefault(twin, cells[column])
    heads = {column: "base" if len(groups) == 1 else f"base of {names[column[0]]}" for column in groups}
    several = len({number for number, _ in columns}) > 1
    for number, model in (column for column in columns if column[1] != BASE):
        name = names[number] if model == TRAINED else f"{names[number]} · {model}"
        heads[number, model] = name if several else model
    return heads


def _agree(first: Column, second: Column, asked: dict[tuple, dict[Column, Picture]]) -> bool:
    shared = [cells for cells in asked.values() if first in cells and second in cells]
    return bool(shared) and all(cells[first] == cells[second] for cells in shared)

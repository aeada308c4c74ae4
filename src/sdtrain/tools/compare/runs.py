"""Reads runs: what the pipeline recorded in git, or on disk, of params, code, data and metrics."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.ground import git
from sdtrain.ground.errors import InputError
from sdtrain.ground.values import read_values
from sdtrain.params.load import parse_yaml
from sdtrain.tools.sweep.failures import failures_of

if TYPE_CHECKING:
    import pandas as pd

WORKSPACE = "workspace"
"""The files on disk, as a revision."""

_PARAMS, _LOCK, _METRICS = "params.yaml", "dvc.lock", "metrics"
_NUMBERS, _VALUES = f"{_METRICS}/evaluate.json", f"{_METRICS}/values.parquet"


Row = dict[str, float | None]
"""Of a table, by column; None where the cell is empty."""


@dataclass(frozen=True)
class Run:
    """One execution of the pipeline, as it was recorded."""

    name: str
    """The revision, as it was asked for: an experiment's name, a branch, a tag, a commit or `workspace`."""
    is_head: bool
    """Whether it is the commit that is checked out."""
    params: dict[str, Any]
    """The tree of params.yaml, of whatever version of the schema."""
    lock: dict[str, Any]
    """The tree of dvc.lock: the params, code and data that the metrics were made with."""
    numbers: dict[str, float]
    """Of all `metrics/*.json`, by name."""
    values: "pd.DataFrame | None"
    """The table of `ground.values`; None if the run has none."""
    tables: dict[str, bytes]
    """The files in `metrics/`, by path."""

    def texts(self, name: str) -> list[dict[str, str]]:
        """The rows of `metrics/<name>`, by column; none if it is missing."""
        text = self.tables.get(f"{_METRICS}/{name}", b"").decode(errors="replace")
        return list(csv.DictReader(io.StringIO(text)))

    def table(self, name: str, columns: Sequence[str]) -> list[Row]:
        """The same as numbers; none if it is older than one of these columns.

        Raises:
            InputError: a cell is no number.
        """
        rows = self.texts(name)
        if not rows or not set(columns) <= rows[0].keys():
            return []
        try:
            return [{key: float(text) if text else None for key, text in row.items()} for row in rows]
        except (ValueError, TypeError) as error:
            raise InputError(f"{_METRICS}/{name} of {self.name}: {error}; run `dvc repro`") from None


def read_run(root: Path, rev: str) -> Run:
    """Read the run of an experiment's name, branch, tag, commit, or of the files on disk (`workspace`).

    Raises:
        InputError: there is no such revision, or it lacks a file or has a broken one; says what makes the file.
    """
    if rev == WORKSPACE:
        return _run(rev, False, _files_on_disk(root))
    return _read_commit(root, rev, git.resolve(root, rev), git.head_commit(root))


def read_experiments(root: Path) -> tuple[list[Run], list[str]]:
    """HEAD and all experiments that started from it.

    Those that can't be read, and tasks of sweeps that failed, are named in the second list.
    """
    head = git.head_commit(root)
    named = [("HEAD", head)]
    named += [(found.name, found.commit) for found in git.experiments(root) if found.baseline == head]
    runs, faults = [], [_left_out(name, why) for name, why in _failed_tasks(root).items()]
    for name, commit in named:
        try:
            runs.append(_read_commit(root, name, commit, head))
        except InputError as fault:
            faults.append(f"left out: {fault}")
    return runs, faults


def _failed_tasks(root: Path) -> dict[str, str]:
    """Tasks of sweeps of HEAD that failed and have no experiment, by name why."""
    head = git.head_commit(root)
    made = {found.name for found in git.experiments(root) if found.baseline == head}
    return {name: why for name, why in failures_of(root, head).items() if name not in made}


def _left_out(name: str, why: str) -> str:
    return f"left out: {name}: {why}"


def read_runs(root: Path, revs: Sequence[str]) -> tuple[list[Run], list[str]]:
    """The runs of these revisions, as `read_run`; without any, as `read_experiments`.

    A sweep's task that failed is left out, and named in the second list.

    Raises:
        InputError: `read_run`'s; there is no run at all, and why; or `root` isn't the project's.
    """
    if not (root / ".dvc").is_dir():
        raise InputError(f"{root.resolve()} isn't a DVC project; run the command from the project's root")
    if revs:
        failed = _failed_tasks(root)
        runs = [read_run(root, rev) for rev in dict.fromkeys(revs) if rev not in failed]
        faults = [_left_out(rev, failed[rev]) for rev in dict.fromkeys(revs) if rev in failed]
    else:
        runs, faults = read_experiments(root)
    if not runs:
        raise InputError("\n".join(["there is no run to compare; run `dvc exp run`", *faults]))
    return runs, faults


def _read_commit(root: Path, name: str, commit: str, head: str) -> Run:
    return _run(name, commit == head, git.read_files(root, commit, [_PARAMS, _LOCK, _METRICS]))


def _files_on_disk(root: Path) -> dict[str, bytes]:
    paths = [root / _PARAMS, root / _LOCK, *sorted((root / _METRICS).glob("*.*"))]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def _run(name: str, is_head: bool, files: dict[str, bytes]) -> Run:
    for path in (_PARAMS, _LOCK, _NUMBERS):
        if path not in files:
            again = "run `dvc repro`, then `git add` and commit what it wrote, or leave it out"
            way = "run `dvc repro`" if name == WORKSPACE else again
            raise InputError(f"{name} has no {path}; {way}")
    numbers: dict[str, float] = {}
    for path in sorted(path for path in files if path.startswith(f"{_METRICS}/") and path.endswith(".json")):
        tree = _read_json(files[path], f"{path} of {name}")
        numbers |= {key: value for key, value in tree.items() if type(value) in (int, float)}
    return Run(
        name,
        is_head,
        params=_read_yaml(files[_PARAMS], f"{_PARAMS} of {name}"),
        lock=_read_yaml(files[_LOCK], f"{_LOCK} of {name}"),
        numbers=numbers,
        values=read_values(files[_VALUES], f"{_VALUES} of {name}") if _VALUES in files else None,
        tables={path: content for path, content in files.items() if path.startswith(f"{_METRICS}/")},
    )


def _mapping(tree: object, name: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise InputError(f"{name}: expected a mapping, got {type(tree).__name__}; run `dvc repro`")
    return tree


def _read_json(content: bytes, name: str) -> dict[str, Any]:
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise InputError(f"{name}: not valid JSON: {error}; run `dvc repro`") from None
    return _mapping(tree, name)


def _read_yaml(content: bytes, name: str) -> dict[str, Any]:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not valid YAML: {error}") from None
    return _mapping(parse_yaml(text, name), name)

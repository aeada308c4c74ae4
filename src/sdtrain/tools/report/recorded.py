"""What a run left: its tables and numbers, which git has, and its outs, from DVC's cache or from the disk."""

import json
import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sdtrain.ground import git
from sdtrain.ground.errors import InputError
from sdtrain.tools.compare.runs import WORKSPACE, Row, Run

SAMPLES, VALIDATION, EVALUATION, CHECKPOINTS = "data/samples", "plots/validation", "data/evaluation", "data/checkpoints"
"""The outs that a report reads."""
_METRICS = "metrics"


@dataclass(frozen=True)
class Folder:
    """A folder that a stage wrote, as far as it can be had."""

    path: str
    files: dict[str, Path]
    """Where each lies, by its path below the folder."""
    missing: str | None = None
    """Why some or all can't be had, as the end of a sentence; None of a folder that is empty."""

    def json(self, name: str) -> Any:
        """A file's JSON tree.

        Raises:
            InputError: it is missing or broken.
        """
        if name not in self.files:
            raise InputError(self.missing or f"{self.path} has no {name}")
        try:
            return json.loads(self.files[name].read_bytes())
        except OSError as error:
            raise InputError(f"{self.path}/{name} can't be read: {error.strerror}") from None
        except ValueError as error:
            raise InputError(f"{self.path}/{name} isn't valid JSON: {error}") from None


@dataclass(frozen=True)
class Recorded:
    """A run, with all that a report shows of it."""

    run: Run
    commit: str | None
    """None of the files on disk."""
    time: str | None
    """Of the commit, ISO 8601."""
    is_experiment: bool
    """Whether DVC made the commit."""
    outs: dict[str, Folder]
    """By path."""

    @property
    def name(self) -> str:
        return self.run.name

    def texts(self, name: str) -> list[dict[str, str]]:
        """As of the run."""
        return self.run.texts(name)

    def table(self, name: str, columns: Sequence[str]) -> list[Row]:
        """As of the run."""
        return self.run.table(name, columns)

    def numbers(self, name: str) -> dict[str, float]:
        """The numbers of `metrics/<name>`, whose other values are left out; none if it is missing."""
        tree = json.loads(self.run.tables.get(f"{_METRICS}/{name}", b"{}"))
        return {key: value for key, value in tree.items() if type(value) in (int, float) and math.isfinite(value)}


def read_recorded(root: Path, run: Run) -> Recorded:
    """Read what a run left.

    Outs that can't be had are no error: their folders say why. Nothing is fetched from a remote.

    Raises:
        InputError: the run's revision is gone, or DVC can't be asked where its cache is.
    """
    paths = (SAMPLES, VALIDATION, EVALUATION, CHECKPOINTS)
    if run.name == WORKSPACE:
        return Recorded(run, None, None, False, {path: _on_disk(root, path) for path in paths})
    commit = git.resolve(root, run.name)
    outs = {path: _in_cache(_cache_folder(root.resolve()), run, commit, path) for path in paths}
    is_experiment = any(found.commit == commit for found in git.experiments(root))
    return Recorded(run, commit, git.commit_time(root, commit), is_experiment, outs)


@cache
def _cache_folder(root: Path) -> Path:
    try:
        done = subprocess.run(["dvc", "cache", "dir"], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError("dvc: no such command; activate the environment in which sdtrain is installed") from None
    if done.returncode:
        raise InputError(f"dvc cache dir failed in the project's root: {done.stderr.strip()}")
    return Path(done.stdout.strip())


def _on_disk(root: Path, path: str) -> Folder:
    found = sorted(file for file in (root / path).rglob("*") if file.is_file())
    files = {file.relative_to(root / path).as_posix(): file for file in found}
    return Folder(path, files, None if (root / path).is_dir() else f"there is no {path} on disk")


def _in_cache(cache_folder: Path, run: Run, commit: str, path: str) -> Folder:
    """By the hash in dvc.lock: of a folder DVC 3 keeps a list of its files, and each of these under its own hash."""
    outs = [out for stage in (run.lock.get("stages") or {}).values() for out in stage.get("outs", [])]
    digest = next((str(out.get("md5")) for out in outs if out["path"] == path), None)
    if digest is None:
        return Folder(path, {}, f"its dvc.lock has no {path}, so its code wrote none")

    def place(md5: str) -> Path:
        return cache_folder / "files" / "md5" / md5[:2] / md5[2:]

    again = f"get it with `git checkout {commit[:10]}` and `dvc fetch {path}`"
    try:
        listed = json.loads(place(digest).read_bytes())
    except FileNotFoundError:
        return Folder(path, {}, f"{path} isn't in DVC's cache; {again}")
    except (OSError, ValueError):
        return Folder(path, {}, f"the list of {path} in DVC's cache is damaged; {again}")
    files = {entry["relpath"]: place(entry["md5"]) for entry in listed}
    there = {name: file for name, file in files.items() if file.is_file()}
    num_missing = len(files) - len(there)
    return Folder(path, there, f"of {path} {num_missing} files aren't in DVC's cache; {again}" if num_missing else None)

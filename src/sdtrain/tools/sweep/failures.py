"""Tasks of sweeps that failed: they made no experiment, so they are noted for comparisons to name."""

import re
from pathlib import Path

from sdtrain.ground.files import read_json, write_json
from sdtrain.tools.sweep.starts import FOLDER, log_of

_NOT_THE_CAUSE = re.compile(r"ERROR: |WARNING: |> |Running stage |Stage |Reproducing |To see |\s")
"""With which lines begin that DVC adds to a stage's own error."""


def note_failure(name: str, head: str, why: str, lines: list[str]) -> None:
    """Note that a task of this commit failed.

    Args:
        why: how its dvc ended.
        lines: the end of its log.
    """
    write_json(_path(name), {"head": head, "why": why, "error": _cause(lines)})


def forget_failure(name: str) -> None:
    """As a task starts again."""
    _path(name).unlink(missing_ok=True)


def failures_of(root: Path, head: str) -> dict[str, str]:
    """By the task's name why those of a commit failed, as the end of a sentence.

    Raises:
        InputError: a note is broken.
    """
    found = {}
    for path in sorted((root / FOLDER).glob(_path("*").name)):
        noted = read_json(path)
        if noted["head"] == head:
            name = path.name.removesuffix(_path("").name)
            found[name] = f"its task failed: {noted['error'] or noted['why']} ({log_of(name)})"
    return found


def _path(name: str) -> Path:
    return FOLDER / f"{name}.failed.json"


def _cause(lines: list[str]) -> str | None:
    """The line that says why, as far as it can be told: the last one of a stage's own error, or of a traceback."""
    own = [line.strip() for line in lines if not _NOT_THE_CAUSE.match(line)]
    said = [line.removeprefix("error: ") for line in own if line.startswith("error: ")]
    return (said or own or [None])[-1]

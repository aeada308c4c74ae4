"""Starts of `dvc exp run --temp`, one at a time.

Tried with DVC 3.67: to take its snapshot, `dvc exp run` detaches HEAD, puts the workspace's changes away in git's
stash, writes the params into the workspace, and puts all of it back; that takes a moment at the start of each run. Of
two runs that start at once one waits for DVC's lock, for three seconds at the most; and between the lock's release and
the copy, one could take the other's snapshot. A run that is killed in that moment leaves the workspace as it was then:
HEAD detached, changes in the stash, another task's params in the file, or half of them. So a sweep starts one run after
the other, writes down before each what the workspace was, and puts it back if the run died before it had its copy.
"""

import fcntl
import os
from pathlib import Path

from sdtrain.ground.files import read_json, write_json
from sdtrain.ground.git import head_commit
from sdtrain.tools.sweep.git import git, lock_file_of_index, try_git, workspace_commit

FOLDER = Path(".dvc/tmp/sweep")
"""Logs and locks of all sweeps of a project."""
_JOURNAL = FOLDER / "start.json"
_START_LOCK = FOLDER / "start"
_STASH = "refs/stash"
_WAITING = "refs/exps/stash"
"""Where DVC keeps the snapshot of a run until it has its copy."""
_HAS_COPY = b"Reproducing experiment '"
"""What DVC prints once a run has its copy of the project, and needs the workspace no more."""


def log_of(name: str) -> Path:
    """The file with what a task's last run printed."""
    return FOLDER / f"{name}.log"


def lock_of(name: str) -> Path:
    """The file that is locked while a task runs."""
    return FOLDER / f"{name}.lock"


def has_started(name: str) -> bool:
    """Whether a task's last run has its own copy of the project."""
    try:
        with log_of(name).open("rb") as file:
            return _HAS_COPY in file.read(1 << 16)
    except FileNotFoundError:
        return False


def try_lock(path: Path) -> int | None:
    """A descriptor that locks the file while it, or one that a process inherited, is open; None if another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def try_begin() -> int | None:
    """Lock the workspace against other starts, and put back what a killed one left; None if a start is under way.

    Also a run whose sweep was killed may be starting: it holds its task's lock, and has no copy yet.
    """
    descriptor = try_lock(_START_LOCK)
    if descriptor is None:
        return None
    for path in FOLDER.glob("*.lock"):
        lock = try_lock(path)
        if lock is not None:
            os.close(lock)
        elif not has_started(path.name.removesuffix(".lock")):
            os.close(descriptor)
            return None
    _put_back()
    return descriptor


def write_journal(name: str, workspace: str) -> None:
    """Write down, before a start, what it may leave changed.

    Args:
        workspace: commit of the tracked files as they are.
    """
    before = {"name": name, "commit": head_commit(Path()), "workspace": workspace}
    before |= {"head": try_git("symbolic-ref", "--quiet", "HEAD")}
    before |= {"stash": _tip(_STASH), "waiting": _tip(_WAITING)}
    write_json(_JOURNAL, before)


def end(descriptor: int) -> None:
    """Let others start, once the run has its copy or has ended."""
    _put_back()
    os.close(descriptor)


def _put_back() -> None:
    """Put HEAD, the workspace and the stashes back, if the last start was killed before its run had its copy."""
    if not _JOURNAL.exists():
        return
    before = read_json(_JOURNAL)
    if not has_started(before["name"]):
        if _is_detached(before) or _is_in_stash(before):
            _put_workspace_back(before)
        if _tip(_WAITING) not in (None, before["waiting"]):  # else DVC's next run would do this one, too
            git("reflog", "delete", "--updateref", "--rewrite", f"{_WAITING}@{{0}}")
            if before["waiting"] is None:
                git("update-ref", "-d", _WAITING)
    _JOURNAL.unlink()


def _put_workspace_back(before: dict) -> None:
    lock_file_of_index().unlink(missing_ok=True)  # of the killed run
    left, in_stash = workspace_commit(), _is_in_stash(before)
    if before["head"]:
        git("symbolic-ref", "HEAD", before["head"])
    git("reset", "--hard", "--quiet", before["commit"])
    if before["workspace"] != before["commit"]:
        git("stash", "apply", "--index", "--quiet", before["workspace"])
    if in_stash:
        git("stash", "drop", "--quiet")
    print(
        f"{before['name']} was killed while DVC had changed the workspace; it is put back as it was before that start "
        f"(if something of yours is missing: git stash apply {left})"
    )


def _is_detached(before: dict) -> bool:
    return (
        before["head"] is not None
        and try_git("symbolic-ref", "--quiet", "HEAD") is None
        and head_commit(Path()) == before["commit"]
    )


def _is_in_stash(before: dict) -> bool:
    """Whether git's stash has, on its top, what the workspace had before."""
    top = _tip(_STASH)
    if top is None or top == before["stash"]:
        return False
    return git("rev-parse", f"{top}^{{tree}}") == git("rev-parse", f"{before['workspace']}^{{tree}}")


def _tip(ref: str) -> str | None:
    return try_git("rev-parse", "--verify", "--quiet", ref)

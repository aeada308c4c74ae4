"""What git has: revisions, DVC's experiments among them, and the files that they hold.

DVC keeps an experiment as a commit under `refs/exps/<2 digits>/<38 digits>/<name>`; the digits are the commit that it
started from.
"""

import difflib
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtrain.ground.errors import InputError

_EXPERIMENT = re.compile(r"refs/exps/([0-9a-f]{2})/([0-9a-f]{38})/([^/]+)")
"""Other names below `refs/exps` are DVC's own."""


@dataclass(frozen=True)
class Experiment:
    """A DVC experiment."""

    name: str
    commit: str
    baseline: str
    """The commit that it started from."""


def head_commit(root: Path) -> str:
    """The commit that is checked out.

    Raises:
        InputError: this is no git repository, or it has no commit.
    """
    return _git(root, "rev-parse", "--verify", "HEAD^{commit}").decode().strip()


def commit_time(root: Path, commit: str) -> str:
    """When a commit was made, in its own time zone: ISO 8601, e.g. `2026-11-28T22:14:37+01:00`."""
    return _git(root, "show", "--no-patch", "--format=%cI", commit).decode().strip()


def experiments(root: Path) -> list[Experiment]:
    """All experiments of the repository, by name."""
    lines = _git(root, "for-each-ref", "--format=%(refname) %(objectname)", "refs/exps").decode().splitlines()
    found = []
    for line in lines:
        ref, commit = line.rsplit(" ", 1)
        if match := _EXPERIMENT.fullmatch(ref):
            found.append(Experiment(match[3], commit, match[1] + match[2]))
    return sorted(found, key=lambda experiment: (experiment.name, experiment.baseline))


def resolve(root: Path, rev: str) -> str:
    """The commit of an experiment's name, branch, tag or commit.

    Experiments win over branches, those of the commit that is checked out over others.

    Raises:
        InputError: there is none, or experiments of several commits have the name and none is of this one.
    """
    head, known = head_commit(root), experiments(root)
    named = [experiment for experiment in known if experiment.name == rev]
    named = [experiment for experiment in named if experiment.baseline == head] or named
    if len(named) > 1:
        choices = ", ".join(f"{found.commit[:7]} (started from {found.baseline[:7]})" for found in named)
        raise InputError(f"{rev}: {len(named)} experiments have this name; give the commit of one: {choices}")
    if named:
        return named[0].commit
    try:
        return _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}").decode().strip()
    except InputError:
        names = sorted({experiment.name for experiment in known})
        near = difflib.get_close_matches(rev, names, n=3)
        there = f"nearest is {' or '.join(near)}" if near else f"there are {', '.join(names) or 'no experiments'}"
        raise InputError(f"{rev}: no experiment, branch, tag or commit has this name; {there}") from None


def read_files(root: Path, commit: str, paths: Sequence[str]) -> dict[str, bytes]:
    """The files of a commit at these paths, or below them if they are folders; by path, relative to `root`.

    What isn't there is left out.
    """
    listed = _git(root, "ls-tree", "-r", "-z", commit, "--", *paths).decode().split("\0")
    entries = [line.split("\t", 1) for line in listed if line]
    blobs = {path: facts.split()[2] for facts, path in entries if facts.split()[1] == "blob"}
    answer = _git(root, "cat-file", "--batch", stdin="".join(f"{blob}\n" for blob in blobs.values()).encode())
    found, start = {}, 0
    for path in blobs:  # each is `<hash> blob <size>`, a line break, the content, a line break
        header_end = answer.index(b"\n", start)
        size = int(answer[start:header_end].split()[2])
        found[path] = answer[header_end + 1 : header_end + 1 + size]
        start = header_end + 1 + size + 1
    return found


def _git(root: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, input=stdin, capture_output=True)
    except FileNotFoundError as error:
        fault = f"{root}: no such folder" if not root.is_dir() else "git isn't installed; install it"
        raise InputError(fault) from error
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        if "not a git repository" in message:
            raise InputError(
                f"{root.resolve()} isn't in a git repository; run the command from the project's root, or run "
                "`git init` there and commit"
            )
        raise InputError(f"git {' '.join(arguments)} failed in {root}: {message or 'no message'}")
    return done.stdout

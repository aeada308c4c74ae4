"""What a sweep asks git: the workspace as a commit, and what an experiment was made of."""

import subprocess
from pathlib import Path

from sdtrain.ground.errors import InputError
from sdtrain.ground.git import experiments, head_commit, read_files
from sdtrain.params.load import check_params, parse_yaml
from sdtrain.params.schema import Params

PARAMS = "params.yaml"
_CODE = ("src", "stages", "dvc.yaml", "data")
"""Of `data` what git tracks: the built-in base, and what a run branches or starts from."""


def git(*arguments: str) -> str:
    """What a git command printed, without the newline at its end.

    Raises:
        InputError: it failed.
    """
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise InputError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.rstrip("\n")


def try_git(*arguments: str) -> str | None:
    """As `git`, but None if the command failed."""
    try:
        return git(*arguments)
    except InputError:
        return None


def workspace_commit() -> str:
    """A commit with the tracked files as they are, on no branch; HEAD's if nothing was changed."""
    return git("stash", "create") or head_commit(Path())


def changed_between(one: str, two: str, *paths: str) -> list[str]:
    """The files that differ between two commits; by default of those that decide what a run computes."""
    return git("diff", "--name-only", "--relative", one, two, "--", *(paths or (PARAMS, *_CODE))).splitlines()


def find_experiment(name: str, head: str) -> str | None:
    """The commit of the experiment of this name that was made on `head`."""
    found = [known.commit for known in experiments(Path()) if (known.name, known.baseline) == (name, head)]
    return found[0] if found else None


def how_it_differs(experiment: str, params: Params, workspace: str) -> str:
    """In which params and files an experiment differs from a run with these params and the code of a commit.

    Returns:
        E.g. `train.lr 0.002 there, 0.001 here; src/sdtrain/train.py`; empty if it is the same.
    """
    texts = []
    text = read_files(Path(), experiment, [PARAMS]).get(PARAMS, b"").decode(errors="replace")
    try:
        theirs = _flat(check_params(parse_yaml(text, name=PARAMS)).model_dump())
    except InputError:
        texts.append(f"{PARAMS}, which isn't valid for this version")
    else:
        ours = _flat(params.model_dump())
        differ = [key for key in theirs | ours if theirs.get(key) != ours.get(key)]
        texts += [f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in differ]
    return "; ".join([*texts, *changed_between(experiment, workspace, *_CODE)])


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def lock_file_of_index() -> Path:
    """The file that git has while it writes its index, and leaves if it is killed."""
    return Path(git("rev-parse", "--git-path", "index.lock"))

"""Saved states: what a run needs to resume from a step as if it had never stopped.

`<root>/<fingerprint>/step-<n>/` has `weights.safetensors`, `ema.safetensors` (if an average is kept),
`optimizer.safetensors`, `state.json` (`StateHead`) and `SHA256SUMS`, which lists each file's SHA-256;
`<root>/<fingerprint>/checkpoints/` has the best checkpoints so far, and `finished.json` is there once
the run has written its outs. `<root>/<fingerprint>/images/step-<n>/` has the validation images drawn there
(`images.py`). The root is outside the outs, which DVC deletes before a stage runs, and
outside the copies that `--temp` and queued runs work in. A state is complete or not there: it is
written under another name, flushed to disk, and renamed. Two are kept. A state and the checkpoints
that it refers to are checked before it is used; a damaged one is renamed to `step-<n>.damaged`, and
the state before it is used. There is no random state to save: every draw is a function of seed and
place (`randomness.py`).
"""

import os
import re
import shutil
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import (
    PARTIAL,
    SEAL,
    check_sealed,
    delete_folder,
    disk_errors_explained,
    new_folder,
    read_json,
    seal_folder,
    set_aside,
    sha256_file,
    write_json,
)
from sdtrain.training.identity import describe, differences, fingerprint
from sdtrain.training.state_files import (
    FORMAT_VERSION,
    Record,
    StateHead,
    check_state,
    flat_state,
    read_head,
    read_record,
)

_NUM_KEPT = 2
"""States kept of a run: the newest, and the one before it in case the newest is damaged."""
_FINISHED = "finished.json"
_STEP = re.compile(r"step-\d{8}")


class _Owner(Record):
    """owner.json: who trains the run."""

    pid: int | str
    host: str


class StateStore:
    """The saved states of one run, named by its identity's fingerprint."""

    def __init__(self, root: Path, identity: dict) -> None:
        self.identity, self.fingerprint = identity, fingerprint(identity)
        self.root, self.folder = root, root / self.fingerprint
        self._lock = _lock_of(self.folder)

    def lock(self) -> None:
        """Lock the run against other processes until this one ends, and delete what a killed one left behind.

        Raises:
            InputError: another process trains it already.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        owner = self.folder / "owner.json"
        try:
            self._lock.acquire(timeout=2)  # not 0: another run that is starting may be checking this lock
        except Timeout:
            try:
                who = read_record(_Owner, owner, read_json(owner))
            except InputError:
                who = _Owner(pid="?", host="?")
            raise InputError(
                f"another process is already training this run (pid {who.pid} on {who.host}, state in "
                f"{self.folder}); wait until it ends, or stop it: kill {who.pid}"
            ) from None
        write_json(owner, {"pid": os.getpid(), "host": socket.gethostname()})
        for partial in self.folder.rglob(f"*{PARTIAL}"):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)

    def unlock(self) -> None:
        """Let others train this run."""
        self._lock.release()

    def newest(self, num_steps: int) -> Path | None:
        """The run's last state up to `num_steps`, without checking it."""
        found = [path for path in _states_in(self.folder) if _step_of(path) <= num_steps]
        return found[-1] if found else None

    def newest_sound(self, num_steps: int) -> Path | None:
        """The run's last undamaged state up to `num_steps`; sets damaged ones aside, and prints that.

        Raises:
            InputError: a damaged one can't be renamed.
        """
        entries = [path for path in entries_in(self.folder) if _step_of(path) <= num_steps]
        for path in reversed(entries):
            try:
                self.check(path)
            except InputError as fault:
                kept = _set_aside(path)
                if isinstance(fault, _CheckpointError) and fault.checkpoint.exists():
                    kept = f"{_set_aside(fault.checkpoint)}, and {kept}"
                print(f"{path} isn't used: {fault}; {kept}")
            else:
                return path
        if entries:
            print(f"run {self.fingerprint} starts over: none of its saved states can be used")
        return None

    def check(self, state: Path) -> StateHead:
        """Check that a state of this run, and the checkpoints that it refers to, are what was saved.

        Raises:
            InputError: names what doesn't match.
        """
        head = check_state(state)
        if head.fingerprint != self.fingerprint:
            raise InputError(f"{state} belongs to run {head.fingerprint}, not to {self.fingerprint}")
        if head.step != _step_of(state):
            raise InputError(f"{state / 'state.json'} is for step {head.step}")
        for best in head.best:
            checkpoint = self.checkpoint(best.step)
            if str(best.step) not in head.checkpoints:
                raise InputError(f"{state / 'state.json'} lacks the hash of checkpoint {best.step}")
            try:
                check_sealed(checkpoint)
            except InputError as fault:
                raise _CheckpointError(str(fault), checkpoint) from None
            if sha256_file(checkpoint / SEAL) != head.checkpoints[str(best.step)]:
                raise _CheckpointError(f"{checkpoint} isn't the checkpoint that {state.name} refers to", checkpoint)
        return head

    def state(self, step: int) -> Path:
        """The path of the state after `step` steps, whether it exists or not."""
        return self.folder / f"step-{step:08}"

    def why_none(self) -> str | None:
        """Why none of the existing states is used; None if there are none."""
        if own := _states_in(self.folder):
            return f"{own[-1]} isn't used: it is beyond the run's last step"
        others = [states[-1] for folder in self._other_runs() if (states := _states_in(folder))]
        for path in sorted(others, key=_changed_at, reverse=True):
            try:
                found = differences(read_head(path).identity, self.identity)
            except (InputError, OSError):  # of another version, or being deleted
                continue
            return f"{path} isn't used, because it differs: {describe(found)}"
        return None

    def save(
        self, step: int, weights: dict[str, nn.Parameter], ema: EMAModel | None, optimizer: Optimizer, fields: dict
    ) -> Path:
        """Write the state after `step` steps, then delete all but the last two and checkpoints that neither refers to.

        Args:
            fields: `Run.head_fields`.

        Raises:
            InputError: the disk is full, or one of the best checkpoints is missing.
        """
        target = self.state(step)
        if not target.exists():  # it does if the run was resumed here, or has only validated since
            tensors, scalars = flat_state(optimizer.state_dict()["state"])
            files = {"weights": {name: parameter.detach().contiguous() for name, parameter in weights.items()}}
            if ema is not None:
                files["ema"] = dict(zip(weights, ema.shadow_params, strict=True))
            self._write(step, {**files, "optimizer": tensors}, {"optimizer_scalars": scalars, **fields})
        for older in [state for state in _states_in(self.folder) if _step_of(state) < step][: 1 - _NUM_KEPT]:
            delete_folder(older)
        self.tidy([best["step"] for best in fields["best"]])
        return target

    def _write(self, step: int, files: dict[str, dict[str, torch.Tensor]], fields: dict) -> None:
        """Write the state after `step` steps: tensors by name, by stem of their file, and the head's further fields."""
        seals = {best["step"]: self.checkpoint(best["step"]) / SEAL for best in fields["best"]}
        for seal in seals.values():
            if not seal.is_file():
                raise InputError(f"{seal.parent} is missing or damaged, so no state that refers to it can be saved")
        before = self.newest(step)
        needs_bytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        with (
            disk_errors_explained(
                f"the state after step {step}, {self.state(step)}",
                self.folder,
                needs_bytes,
                (lambda: f"the last good state is {before}") if before else None,
            ),
            new_folder(self.state(step), durable=True) as folder,
        ):
            for stem, tensors in files.items():
                save_file(tensors, folder / f"{stem}.safetensors")
            head = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "fingerprint": self.fingerprint,
                "identity": self.identity,
                "checkpoints": {str(best): sha256_file(seal) for best, seal in seals.items()},
            }
            write_json(folder / "state.json", {**head, **fields})
            seal_folder(folder)
        (self.folder / _FINISHED).unlink(missing_ok=True)

    def finish(self, step: int) -> None:
        """Record that the run's outs, after `step` steps, are written."""
        write_json(self.folder / _FINISHED, {"step": step})

    def tidy(self, best: list[int]) -> None:
        """Delete the checkpoints of steps that are neither in `best` nor needed by a state on disk."""
        kept = set(best)
        for state in _states_in(self.folder):
            with suppress(InputError):  # a damaged one won't be used, so it needs nothing
                kept |= {entry.step for entry in read_head(state).best}
        for checkpoint in entries_in(self.folder / "checkpoints"):
            if _step_of(checkpoint) not in kept:
                delete_folder(checkpoint)

    def checkpoint(self, step: int) -> Path:
        """The path of a checkpoint of this run."""
        return self.folder / "checkpoints" / f"step-{step:08}"

    def images(self, step: int) -> Path:
        """The path of the images drawn at a validation of this run."""
        return self.folder / "images" / f"step-{step:08}"

    def clear(self) -> None:
        """Delete this run's states, checkpoints and images, the damaged ones too."""
        (self.folder / _FINISHED).unlink(missing_ok=True)
        for path in [*self.folder.glob("step-*"), self.folder / "checkpoints", self.folder / "images"]:
            if path.is_dir():
                delete_folder(path)
            else:
                path.unlink(missing_ok=True)

    def size_bytes(self) -> int:
        """Disk space of this run's states and checkpoints, without damaged ones."""
        folders = [*_states_in(self.folder), *entries_in(self.folder / "checkpoints")]
        return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())

    def prune(self, num_runs: int, spare: Path | None, is_swept: bool = False) -> None:
        """Make room for this run: keep `num_runs` - 1 others, or up to `num_runs` if they aren't finished.

        Deletes finished runs first, those saved longest ago first; prints each. Skips runs that are training, and the
        run that contains `spare`.

        Args:
            is_swept: the run is a sweep's task, so unfinished ones are left alone: others of the sweep may be among
                them, about to resume.
        """
        for left in self.root.glob(f"*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        others = [run for run in self._other_runs() if not (spare and spare.resolve().is_relative_to(run.resolve()))]
        others.sort(key=_saved_at, reverse=True)
        unfinished = [run for run in others if _is_unfinished(run)]
        done = [run for run in others if run not in unfinished]
        for run in done[max(0, num_runs - 1 - len(unfinished)) :]:
            self._delete_run(run, f"train.num_saved_runs = {num_runs}")
        if is_swept:
            return
        for run in unfinished[num_runs:]:
            self._delete_run(
                run, f"more than train.num_saved_runs = {num_runs} other runs are unfinished; raise it to keep more"
            )
        if len(unfinished) >= num_runs:
            last = unfinished[num_runs - 1]
            print(
                f"{last} ({_progress_of(last)}) will be deleted when another new run starts; to keep it, finish it or "
                f"raise train.num_saved_runs, now {num_runs}"
            )

    def _delete_run(self, run: Path, why: str) -> None:
        lock = _lock_of(run)
        try:
            lock.acquire(timeout=0)
        except Timeout:  # it is training
            return
        print(f"deletes {run} ({_progress_of(run)}): {why}")
        delete_folder(run)
        lock.release()

    def _other_runs(self) -> list[Path]:
        runs = [path for path in self.root.iterdir() if path.is_dir() and path.suffix != PARTIAL]
        return [path for path in runs if path != self.folder]


class _CheckpointError(InputError):
    """A checkpoint doesn't match the state that refers to it."""

    def __init__(self, fault: str, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        super().__init__(fault)


def _set_aside(path: Path) -> str:
    """Rename a damaged file or folder; returns what to print about it."""
    try:
        return f"{path.name} is kept as {set_aside(path).relative_to(path.parent.parent)}"
    except OSError as error:
        raise InputError(f"{path} is damaged, and can't be renamed ({error}); move it elsewhere") from None


def entries_in(folder: Path) -> list[Path]:
    """Everything named like a state or checkpoint, complete or not, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _STEP.fullmatch(path.name))


def _states_in(folder: Path) -> list[Path]:
    """States, oldest first."""
    return [path for path in entries_in(folder) if (path / "state.json").is_file()]


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _is_unfinished(run: Path) -> bool:
    """Whether a run has a state, and no outs written after it."""
    return bool(_states_in(run)) and not (run / _FINISHED).exists()


def _progress_of(run: Path) -> str:
    """A run's progress, in words."""
    states = _states_in(run)
    if not states:
        return "no saved state"
    when = f"saved {datetime.fromtimestamp(_changed_at(states[-1])):%Y-%m-%d %H:%M}"
    finished = "not finished" if _is_unfinished(run) else "finished"
    try:
        head = read_head(states[-1])
    except InputError:
        return f"step {_step_of(states[-1])}, {finished}, {when}"
    return f"step {head.step} of {head.num_steps}, {finished}, {when}"


def _saved_at(run: Path) -> float:
    return max((_changed_at(state) for state in _states_in(run)), default=0.0)


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another run has just replaced it
        return 0.0


def _lock_of(folder: Path) -> FileLock:
    return FileLock(folder.with_name(folder.name + ".lock"))

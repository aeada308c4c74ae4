"""Saved states: what a run needs to go on from a step as if it had never stopped.

`<root>/<fingerprint>/step-<n>/` holds `weights.safetensors`, `ema.safetensors` (where an average is
kept), `optimizer.safetensors` and `state.json`; `<root>/<fingerprint>/checkpoints/` the best
checkpoints so far. The root lies outside the outs, which DVC deletes before a stage runs, and
outside the copies that `--temp` and queued runs work in. A state is whole or not there: it is
written under another name, flushed to disk, and renamed. No randomness is saved, because there
is none to save: every draw is a function of seed and place (`randomness.py`).
"""

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from sdtrain.checkpoints import is_checkpoint
from sdtrain.errors import InputError
from sdtrain.files import PARTIAL, delete_folder, new_folder, read_json, write_json
from sdtrain.methods.method import Method
from sdtrain.params import TrainParams
from sdtrain.training.identity import describe, differences, fingerprint

_FORMAT_VERSION = 1


class StateStore:
    """The saved states of one run, named by its identity's fingerprint."""

    def __init__(self, root: Path, identity: dict) -> None:
        self.identity, self.fingerprint = identity, fingerprint(identity)
        self.root, self.folder = root, root / self.fingerprint
        self._lock = _lock_of(self.folder)

    def lock(self) -> None:
        """Keep other trainers of this very run out until the process ends, and clear away what a killed one left.

        Raises:
            InputError: another process trains it already.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        owner = self.folder / "owner.json"
        try:
            self._lock.acquire(timeout=2)  # not 0: another run that is starting may look whether this one works
        except Timeout:
            who = read_json(owner) if owner.exists() else {"pid": "?", "host": "?"}
            raise InputError(
                f"another process trains this very run already (pid {who['pid']} on {who['host']}, state in "
                f"{self.folder}); wait until it ends, or stop it: kill {who['pid']}"
            ) from None
        write_json(owner, {"pid": os.getpid(), "host": socket.gethostname()})
        for partial in self.folder.rglob(f"*{PARTIAL}"):
            shutil.rmtree(partial, ignore_errors=True)

    def unlock(self) -> None:
        """Let others train this run."""
        self._lock.release()

    def newest(self, num_steps: int) -> Path | None:
        """The run's last state that isn't beyond `num_steps`."""
        found = [path for path in _states_in(self.folder) if _step_of(path) <= num_steps]
        return found[-1] if found else None

    def state(self, step: int) -> Path:
        """Where the state after `step` steps is, or would be."""
        return self.folder / f"step-{step:08}"

    def why_none(self) -> str | None:
        """Why no state that lies here is used; None where there is none at all."""
        if own := _states_in(self.folder):
            return f"{own[-1]} isn't used: it lies beyond the run's last step"
        others = [states[-1] for folder in self._other_runs() if (states := _states_in(folder))]
        for path in sorted(others, key=_changed_at, reverse=True):
            try:
                found = differences(read_state(path)["identity"], self.identity)
            except (InputError, OSError):  # of another version, or being deleted: of no interest here
                continue
            return f"{path} isn't used, because it differs: {describe(found)}"
        return None

    def save(
        self, step: int, weights: dict[str, nn.Parameter], ema: EMAModel | None, optimizer: Optimizer, facts: dict
    ) -> Path:
        """Write the state after `step` steps, then delete older ones and the checkpoints that none refers to."""
        target = self.state(step)
        if not target.exists():  # it does where the run was resumed here, or has only validated since
            tensors, scalars = _flat(optimizer.state_dict()["state"])
            with new_folder(target, durable=True) as folder:
                raw = {name: parameter.detach().contiguous() for name, parameter in weights.items()}
                save_file(raw, folder / "weights.safetensors")
                if ema is not None:
                    save_file(dict(zip(weights, ema.shadow_params, strict=True)), folder / "ema.safetensors")
                save_file(tensors, folder / "optimizer.safetensors")
                head = {"format_version": _FORMAT_VERSION, "step": step, "identity": self.identity}
                write_json(folder / "state.json", {**head, "optimizer_scalars": scalars, **facts})
        for older in [state for state in _states_in(self.folder) if _step_of(state) < step]:
            delete_folder(older)
        self.tidy([entry["step"] for entry in facts["best"]])
        return target

    def tidy(self, best: list[int]) -> None:
        """Delete the checkpoints of steps that are neither in `best` nor needed by a state on disk."""
        lists = [read_state(state)["best"] for state in _states_in(self.folder)]
        kept = {*best, *(entry["step"] for entries in lists for entry in entries)}
        for checkpoint in (self.folder / "checkpoints").glob("step-????????"):
            if _step_of(checkpoint) not in kept:
                delete_folder(checkpoint)

    def checkpoint(self, step: int) -> Path:
        """Where a checkpoint of this run is kept."""
        return self.folder / "checkpoints" / f"step-{step:08}"

    def clear(self) -> None:
        """Delete this run's states and checkpoints."""
        for folder in (*_states_in(self.folder), self.folder / "checkpoints"):
            if folder.exists():
                delete_folder(folder)

    def size_bytes(self) -> int:
        """What this run's states and checkpoints take on the disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def prune(self, num_runs: int, spare: Path | None) -> None:
        """Keep the states of this run and of the `num_runs` - 1 others saved last.

        Leaves runs that train now, and the run that `spare` lies in.
        """
        for left in self.root.glob(f"*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        others = [run for run in self._other_runs() if not (spare and spare.resolve().is_relative_to(run.resolve()))]
        others.sort(key=_saved_at, reverse=True)
        for folder in others[num_runs - 1 :]:
            lock = _lock_of(folder)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            delete_folder(folder)
            lock.release()

    def _other_runs(self) -> list[Path]:
        runs = [path for path in self.root.iterdir() if path.is_dir() and path.suffix != PARTIAL]
        return [path for path in runs if path != self.folder]


def read_state(folder: Path) -> dict:
    """The facts of a saved state."""
    facts = read_json(folder / "state.json")
    if facts["format_version"] != _FORMAT_VERSION:
        raise InputError(
            f"{folder}: format_version {facts['format_version']}, this code reads {_FORMAT_VERSION}; "
            "delete the folder, or use the sdtrain that wrote it"
        )
    return facts


def load_state(
    folder: Path, weights: dict[str, nn.Parameter], ema: EMAModel | None, optimizer: Optimizer | None
) -> None:
    """Take weights, average and moments over from a saved state; None leaves that part as it is.

    Raises:
        InputError: the state's weights have another structure.
    """
    _copy(folder, load_file(folder / "weights.safetensors"), weights)
    facts = read_state(folder)
    if ema is not None and facts["ema_step"] is not None:
        _copy(folder, load_file(folder / "ema.safetensors"), dict(zip(weights, ema.shadow_params, strict=True)))
        ema.optimization_step = facts["ema_step"]
    elif ema is not None:  # a branch of a run that kept none: it starts here
        _set_average(ema, weights, 0)
    if optimizer is not None:
        state = _nested({**load_file(folder / "optimizer.safetensors"), **facts["optimizer_scalars"]})
        state = {int(index): values for index, values in state.items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


@dataclass(frozen=True)
class Origin:
    """Where a run branches from: `train.resume` as a path."""

    folder: Path
    step: int
    identity: dict
    reset: tuple[str, ...]
    is_checkpoint: bool

    def facts(self) -> dict:
        """What names the origin in the branch's own identity."""
        kind = "checkpoint" if self.is_checkpoint else "state"
        return {"kind": kind, "run": fingerprint(self.identity), "step": self.step, "reset": list(self.reset)}

    def check(self, identity: dict) -> str:
        """Refuse differences that `train.resume_reset` must name; describe the others, which the branch is for.

        Raises:
            InputError: learning rate, schedule or optimizer differ, and aren't reset.
        """
        found = differences(self.identity, {**identity, "origin": self.identity.get("origin")})
        for name in _RESETS:
            changed = {key: values for key, values in found.items() if key in _RESETS[name]}
            if changed and name not in self.reset:
                raise InputError(
                    f"train.resume = '{self.folder}': {describe(changed)}; add {name} to train.resume_reset, "
                    "or set it back"
                )
        return describe(found) or "nothing"

    def load(self, method: Method, weights: dict[str, nn.Parameter], ema: EMAModel | None, optimizer: Optimizer) -> int:
        """Take over what isn't reset; the updates that lie behind."""
        if not self.is_checkpoint:
            load_state(self.folder, weights, ema, None if "optimizer" in self.reset else optimizer)
            return read_state(self.folder)["num_updates"]
        num_averaged = read_json(self.folder / "training_config.json")["ema_step"]
        if ema is not None:  # the weights are those of `raw` in the end
            method.load(self.folder / ("raw" if num_averaged is None else "ema"))
            _set_average(ema, weights, num_averaged or 0)
        method.load(self.folder / "raw")
        return self.step


_RESETS = {
    "lr": {"train.lr", "train.lr_scaling", "train.lr_reference_batch_size"},
    "scheduler": {
        "num_steps", "train.lr_scheduler", "train.lr_num_cycles", "train.lr_power", "train.lr_step_rules",
        "train.lr_warmup_steps",
    },
    "optimizer": {
        "train.optimizer", "train.weight_decay", "train.adam_beta1", "train.adam_beta2", "train.adam_epsilon",
    },
}  # fmt: skip
"""What each reset starts afresh, as keys of the identity."""


def find_origin(params: TrainParams, out: Path, num_steps: int) -> Origin | None:
    """What a run with `train.resume: branch` starts from: a state, a run's newest state, or a checkpoint; else None.

    Raises:
        InputError: nothing of the kind is there, or nothing would be left to do.
    """
    if params.resume != "branch":
        return None
    reset, folder, name = params.resume_reset, Path(params.branch_from), f"train.branch_from = {params.branch_from!r}"
    if folder.absolute().is_relative_to(out.absolute()):
        raise InputError(
            f"{name}: lies in {out}, which DVC deletes before this stage runs; `dvc checkout`, copy it elsewhere, and "
            "name the copy; or name a saved state"
        )
    if not folder.is_dir():
        raise InputError(f"{name}: no such folder; give a saved state, a checkpoint, or auto")
    if is_checkpoint(folder):
        config = read_json(folder / "training_config.json")
        if "optimizer" not in reset:
            raise InputError(
                f"{name}: is a checkpoint, which keeps no optimizer state; add optimizer to train.resume_reset, "
                "or name a saved state"
            )
        origin = Origin(folder, config["step"], config["identity"], tuple(sorted(reset)), is_checkpoint=True)
    else:
        states = [folder] if (folder / "state.json").exists() else _states_in(folder)
        if not states:
            raise InputError(f"{name}: holds neither a saved state nor a checkpoint")
        facts = read_state(states[-1])
        origin = Origin(states[-1], facts["step"], facts["identity"], tuple(sorted(reset)), is_checkpoint=False)
    if origin.step >= num_steps:
        raise InputError(f"{name}: is at step {origin.step}, and the run ends at {num_steps}; train longer")
    return origin


@torch.no_grad()
def _copy(folder: Path, saved: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> None:
    """Copy saved tensors into ours, by name."""
    differ = sorted(
        name for name in saved.keys() | ours.keys()
        if name not in saved or name not in ours or saved[name].shape != ours[name].shape
    )  # fmt: skip
    if differ:
        raise InputError(
            f"{folder}: its weights don't match this run's: {len(differ)} tensors differ in name or shape, "
            f"{', '.join(differ[:3])}{', …' if len(differ) > 3 else ''}"
        )
    for name, tensor in ours.items():
        tensor.copy_(saved[name])


@torch.no_grad()
def _set_average(ema: EMAModel, weights: dict[str, nn.Parameter], num_updates: int) -> None:
    for ours, theirs in zip(ema.shadow_params, weights.values(), strict=True):
        ours.copy_(theirs)
    ema.optimization_step = num_updates


def _flat(state: dict, prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state by path (`3/exp_avg`): tensors, none of which shares memory, and all else."""
    tensors, scalars = {}, {}
    for key, value in state.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            deeper = _flat(value, f"{path}/")
            tensors |= deeper[0]
            scalars |= deeper[1]
        elif isinstance(value, torch.Tensor):
            tensors[path] = value.detach().clone(memory_format=torch.contiguous_format)
        else:
            scalars[path] = value
    return tensors, scalars


def _nested(flat: dict[str, Any]) -> dict:
    """The inverse of `_flat`, with all keys as text."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, key = path.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return tree


def _states_in(folder: Path) -> list[Path]:
    """Whole states, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/state.json") if path.parent.suffix != PARTIAL)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _saved_at(run: Path) -> float:
    return max((_changed_at(state) for state in _states_in(run)), default=0.0)


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another run has just replaced it
        return 0.0


def _lock_of(folder: Path) -> FileLock:
    return FileLock(folder.with_name(folder.name + ".lock"))

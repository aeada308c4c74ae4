"""The files of one saved state: what they hold, how they are checked, and how they are loaded."""

from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import check_sealed, read_json
from sdtrain.training.identity import fingerprint
from sdtrain.training.selection import Candidate

FORMAT_VERSION = 2


class Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class StateHead(Record):
    """state.json: what the state is, and everything in it that isn't a tensor."""

    format_version: Literal[2]
    step: NonNegativeInt
    """Optimizer steps made."""
    num_steps: NonNegativeInt
    """Of the full run, when this was saved."""
    fingerprint: str
    identity: dict
    best: list[Candidate]
    """The best checkpoints so far."""
    checkpoints: dict[str, str]
    """SHA-256 of the `SHA256SUMS` of each best checkpoint, by its step."""
    log: dict
    run_name: str
    num_updates: NonNegativeInt
    ema_step: NonNegativeInt | None
    scaler: dict | None
    params: dict
    """All params that the run was last trained with."""
    optimizer_scalars: dict


_AnyRecord = TypeVar("_AnyRecord", bound=Record)


def read_head(folder: Path) -> StateHead:
    """Read a saved state's head.

    Raises:
        InputError: its state.json is missing, broken, or has another format version.
    """
    path = folder / "state.json"
    tree = read_json(path)
    version = tree.get("format_version", FORMAT_VERSION) if isinstance(tree, dict) else FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise InputError(
            f"{folder}: format_version {version}, this code reads {FORMAT_VERSION}; delete the folder, or use the "
            "sdtrain that wrote it"
        )
    return read_record(StateHead, path, tree)


def check_state(folder: Path) -> StateHead:
    """Check that every file of a saved state is what was written; returns its head.

    Raises:
        InputError: names what is missing or changed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} isn't a folder")
    head = read_head(folder)
    check_sealed(folder)
    if head.fingerprint != fingerprint(head.identity):
        raise InputError(f"{folder / 'state.json'}: its identity doesn't match its fingerprint {head.fingerprint}")
    return head


def read_record(kind: type[_AnyRecord], path: Path, tree: Any) -> _AnyRecord:
    """Parse the JSON tree of a file.

    Raises:
        InputError: names the file and the first thing that is wrong.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        fault = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, fault['loc'])) or 'its content'}: {fault['msg']}") from None


def load_state(
    folder: Path, weights: dict[str, nn.Parameter], ema: EMAModel | None, optimizer: Optimizer | None
) -> StateHead:
    """Load weights, average and moments of a saved state, in place; skips parts that are None. Returns the head.

    Raises:
        InputError: the state's weights have another structure.
    """
    head = read_head(folder)
    _copy(folder, load_file(folder / "weights.safetensors"), weights)
    if ema is not None and head.ema_step is not None:
        _copy(folder, load_file(folder / "ema.safetensors"), dict(zip(weights, ema.shadow_params, strict=True)))
        ema.optimization_step = head.ema_step
    elif ema is not None:  # branched from a run without one: it starts here
        set_average(ema, weights, 0)
    if optimizer is not None:
        state = nested_state({**load_file(folder / "optimizer.safetensors"), **head.optimizer_scalars})
        state = {int(index): values for index, values in state.items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return head


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
def set_average(ema: EMAModel, weights: dict[str, nn.Parameter], num_updates: int) -> None:
    """Set the average to these weights, and its number of updates."""
    for ours, theirs in zip(ema.shadow_params, weights.values(), strict=True):
        ours.copy_(theirs)
    ema.optimization_step = num_updates


def flat_state(state: dict, prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state by path (`3/exp_avg`): tensors, which share no memory, and everything else."""
    tensors, scalars = {}, {}
    for key, value in state.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            deeper = flat_state(value, f"{path}/")
            tensors |= deeper[0]
            scalars |= deeper[1]
        elif isinstance(value, torch.Tensor):
            tensors[path] = value.detach().clone(memory_format=torch.contiguous_format)
        else:
            scalars[path] = value
    return tensors, scalars


def nested_state(flat: dict[str, Any]) -> dict:
    """The inverse of `_flat`, with all keys as text."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, key = path.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return tree

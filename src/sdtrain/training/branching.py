"""Branching: a run that starts from another run's saved state or checkpoint, with other params."""

from dataclasses import dataclass
from pathlib import Path

from diffusers.training_utils import EMAModel
from pydantic import NonNegativeInt
from torch import nn
from torch.optim import Optimizer

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import SEAL, check_sealed, read_json, sha256_file
from sdtrain.methods.checkpoints import is_checkpoint
from sdtrain.methods.method import Method
from sdtrain.params.schema import TrainParams
from sdtrain.training.identity import describe, differences, fingerprint
from sdtrain.training.state_files import Record, check_state, load_state, read_head, read_record, set_average
from sdtrain.training.states import entries_in


class _CheckpointHead(Record):
    """What a branch reads from a checkpoint's training_config.json."""

    step: NonNegativeInt
    identity: dict
    ema_step: NonNegativeInt | None


@dataclass(frozen=True)
class Origin:
    """Where a run branches from: `train.branch_from`."""

    folder: Path
    step: int
    identity: dict
    reset: tuple[str, ...]
    is_checkpoint: bool

    def record(self) -> dict:
        """The origin, as part of the branch's own identity."""
        return {
            "kind": "checkpoint" if self.is_checkpoint else "state",
            "run": fingerprint(self.identity),
            "step": self.step,
            "reset": list(self.reset),
            "sha256": sha256_file(self.folder / SEAL),
        }

    def verify(self) -> None:
        """Check that every file of the origin is what was saved.

        Raises:
            InputError: names the file that is missing or changed.
        """
        try:
            if self.is_checkpoint:
                check_sealed(self.folder)
            else:
                check_state(self.folder)
        except InputError as fault:
            raise InputError(
                f"train.branch_from = '{self.folder}': is damaged: {fault}; copy it again, or choose another"
            ) from None

    def check(self, identity: dict) -> str:
        """Check that `train.resume_reset` covers the differences that need it; describes the others.

        Raises:
            InputError: learning rate, schedule or optimizer differ and aren't reset.
        """
        found = differences(self.identity, {**identity, "origin": self.identity.get("origin")})
        if "method.name" in found:
            theirs, ours = found["method.name"]
            raise InputError(
                f"train.branch_from = '{self.folder}': was trained with method.name = {theirs!r}, params.yaml says "
                f"{ours!r}; a run can branch only from its own method's weights"
            )
        for name in _RESETS:
            changed = {key: values for key, values in found.items() if key in _RESETS[name]}
            if changed and name not in self.reset:
                raise InputError(
                    f"train.branch_from = '{self.folder}': {describe(changed)}; add {name} to train.resume_reset, "
                    "or change it back"
                )
        return describe(found) or "nothing"

    def load(self, method: Method, weights: dict[str, nn.Parameter], ema: EMAModel | None, optimizer: Optimizer) -> int:
        """Load what isn't reset; returns the number of optimizer updates made so far."""
        if not self.is_checkpoint:
            return load_state(self.folder, weights, ema, None if "optimizer" in self.reset else optimizer).num_updates
        config = _read_config(self.folder)
        if ema is not None:
            method.load(self.folder / ("raw" if config.ema_step is None else "ema"))
            set_average(ema, weights, config.ema_step or 0)
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
"""What each reset starts from scratch, as keys of the identity."""


def find_origin(params: TrainParams, out: Path, num_steps: int) -> Origin | None:
    """The state, a run's newest state, or the checkpoint to branch from; None unless `train.resume` is `branch`.

    Raises:
        InputError: it isn't there, its head is broken, or no steps would be left to train.
    """
    if params.resume != "branch":
        return None
    reset, folder, name = params.resume_reset, Path(params.branch_from), f"train.branch_from = {params.branch_from!r}"
    if folder.absolute().is_relative_to(out.absolute()):
        raise InputError(
            f"{name}: is in {out}, which DVC deletes before this stage runs; run `dvc checkout`, copy it "
            "elsewhere and set the copy's path, or use a saved state"
        )
    if not folder.is_dir():
        raise InputError(f"{name}: no such folder; give a saved state or a checkpoint")
    if is_checkpoint(folder):
        config = _read_config(folder)
        if "optimizer" not in reset:
            raise InputError(
                f"{name}: is a checkpoint, which keeps no optimizer state; add optimizer to train.resume_reset, "
                "or use a saved state"
            )
        origin = Origin(folder, config.step, config.identity, tuple(sorted(reset)), is_checkpoint=True)
    else:
        states = [folder] if (folder / "state.json").exists() else entries_in(folder)
        if not states:
            raise InputError(f"{name}: has neither a saved state nor a checkpoint")
        try:
            head = read_head(states[-1])
        except InputError as fault:
            raise InputError(f"{name}: is damaged: {fault}; copy it again, or choose another") from None
        origin = Origin(states[-1], head.step, head.identity, tuple(sorted(reset)), is_checkpoint=False)
    if not (origin.folder / SEAL).is_file():
        raise InputError(f"{name}: is damaged: {origin.folder / SEAL} is missing; copy it again, or choose another")
    if origin.step >= num_steps:
        raise InputError(
            f"{name}: is at step {origin.step}, and the run ends at {num_steps}; raise train.max_steps "
            "or train.max_epochs"
        )
    return origin


def _read_config(folder: Path) -> _CheckpointHead:
    path = folder / "training_config.json"
    return read_record(_CheckpointHead, path, read_json(path))

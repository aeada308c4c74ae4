"""What a run tells while it runs: a progress bar, TensorBoard or Weights & Biases, and curves for DVC.

Every optimizer step hands over one small tensor, which stays on the device until the logging interval
ends; only then, and before a state is saved, is it read.
"""

import importlib.util
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sdtrain.batches import Batch
from sdtrain.errors import InputError
from sdtrain.files import write_text
from sdtrain.params import TrainParams

_QUARTILES = range(1, 5)
_COLUMNS = (
    "loss", *(f"loss_q{q}" for q in _QUARTILES), *(f"rows_q{q}" for q in _QUARTILES),
    "timestep", "timestep_squared", "latent", "latent_squared", "noise", "noise_squared",
    "grad_norm", "param_norm",
)  # fmt: skip
"""What is kept of a step: sums over its rows, and two norms."""
NUM_SUMS = len(_COLUMNS) - 2
_SMOOTHING = 0.99
"""Decay, per optimizer step, of the smoothed loss."""
_MAX_SKIPPED = 25
"""Steps in a row: fp16's scale starts at 2¹⁶ and halves at each, so none is left to try."""
_ADVICE = "lower train.lr, set train.max_grad_norm, or use train.precision: bf16 in place of fp16"


@dataclass(frozen=True)
class StepFacts:
    """What one optimizer step tells."""

    sums: Tensor
    """`batch_sums` of the rows that this process took, added up."""
    grad_norm: Tensor
    """L2 norm of the gradient over all processes, before clipping; a scalar on the device."""
    param_norm: Tensor
    """L2 norm of the weights after the step; a scalar on the device."""
    lr: float
    """With which the step was made."""
    skipped: bool
    """The loss scaling of fp16 found gradients that aren't finite, and left the weights."""
    data_wait_s: float
    """Seconds spent on getting the batch."""


def batch_sums(batch: Batch, losses: Tensor, num_train_timesteps: int) -> Tensor:
    """Sums over one micro-batch, float32 [NUM_SUMS]: the loss, by quartile of the timesteps too, and what went in.

    Args:
        losses: of each row, [B].
    """
    share = batch.timesteps.float() / num_train_timesteps
    in_quartile = ((share * 4).long()[:, None] == torch.arange(4, device=losses.device)).float()
    by_quartile = (in_quartile * losses[:, None]).sum(0)
    moments = (share, batch.latents, batch.noise)
    sums = [sum for values in moments for sum in (values.sum(), values.square().sum())]
    return torch.cat([losses.sum()[None], by_quartile, in_quartile.sum(0), torch.stack(sums)])


class RunLog:
    """Collects a run's curves.

    The training curve's columns, each over the interval since the last row:
    `loss`, the mean of what is minimised; `loss_smoothed`, its moving average over steps (decay 0.99,
    without bias to the start); `lr`, the last step's; `grad_norm`, the mean L2 norm of the whole gradient
    before clipping, and `grad_norm_clip` after it; `param_norm`, the L2 norm of all trained weights before
    the interval's last step, and `param_norm_clip` after that step, made with the clipped gradient;
    `timestep_mean`, `timestep_std`; `latent_std` of the scaled latents; `noise_std` of the target's noise,
    offset included; `loss_q1` to `loss_q4`, the loss where the timestep lies in that quarter of the
    schedule, 1 the cleanest (empty where no row did).

    What was measured with a clock goes into a table of its own, as it is never the same twice:
    `step_time_ms`, `samples_per_sec`, both without validation and saving; `data_wait`, the share of that time
    in which the loop waited for its batch; `peak_memory_gib`, of the GPU, or of the process on a CPU.

    Args:
        restored: what `state` gave when the run was saved.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        num_steps: int,
        params: TrainParams,
        latent_shape: tuple[int, ...],
        num_train_timesteps: int,
        restored: dict | None,
    ) -> None:
        restored = restored or {}
        self.train_rows: list[dict] = restored.get("train_rows", [])
        self.speed_rows: list[dict] = restored.get("speed_rows", [])
        self.validation_rows: list[dict] = restored.get("validation_rows", [])
        self.num_skipped_steps: int = restored.get("num_skipped_steps", 0)
        self.last_good = "nothing was saved"
        self._skipped: list[bool] = restored.get("skipped", [])
        self._skipped_in_a_row: int = restored.get("skipped_in_a_row", 0)
        self._flushed_step: int = restored.get("flushed_step", 0)
        self._smoothed, self._weight = restored.get("smoothed", (0.0, 0.0))
        self._param_norm: float = restored.get("param_norm", 0.0)
        self._read = np.array(restored.get("pending", []), dtype=np.float64).reshape(-1, len(_COLUMNS))
        self._unread: list[Tensor] = []
        self._lr: float = restored.get("lr", 0.0)
        self._accelerator, self._batch_size = accelerator, params.batch_size
        self._num_elements, self._num_train_timesteps = math.prod(latent_shape), num_train_timesteps
        self._max_grad_norm = params.max_grad_norm or math.inf
        self._data_wait_s = 0.0
        self._num_timed = 0
        self._interval_start = time.perf_counter()
        hidden = None if accelerator.is_main_process else True  # None hides it where there is no terminal
        done = self._flushed_step + len(self._skipped)
        self._progress = tqdm(total=num_steps, initial=done, desc="train", unit="step", disable=hidden)

    def start(self, step: int, param_norm: float) -> None:
        """Begin without earlier rows after `step` steps, with weights of this L2 norm."""
        self._flushed_step, self._param_norm = step, param_norm
        self._progress.update(step)

    def step(self, facts: StepFacts) -> None:
        """Note one optimizer step, without reading anything off the device.

        Raises:
            InputError: too many steps in a row were skipped.
        """
        # The same in every process; reading sums over them.
        norms = torch.stack([facts.grad_norm, facts.param_norm]) / self._accelerator.num_processes
        self._unread.append(torch.cat([facts.sums, norms]))
        self._skipped.append(facts.skipped)
        self._lr = facts.lr
        self.num_skipped_steps += facts.skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if facts.skipped else 0
        if self._skipped_in_a_row == _MAX_SKIPPED:
            step = self._flushed_step + len(self._skipped)
            raise InputError(
                f"the gradients aren't finite for {_MAX_SKIPPED} steps up to step {step}; {self.last_good}: {_ADVICE}"
            )
        self._data_wait_s += facts.data_wait_s
        self._num_timed += 1
        self._progress.update()

    def flush(self) -> None:
        """End the interval, if a step was made in it: write a row of its means.

        Raises:
            InputError: a loss or gradient of the interval isn't finite.
        """
        numbers = self._read_pending()
        if not len(numbers):
            return
        step = self._flushed_step + len(numbers)
        kept = numbers[~np.array(self._skipped, dtype=bool)]
        param_norms = [self._param_norm, *numbers[:, _COLUMNS.index("param_norm")]]
        if len(kept):
            self._write_row(step, kept, param_norms[-2], param_norms[-1])
        self._flushed_step, self._param_norm = step, param_norms[-1]
        self._read, self._skipped = self._read[:0], []
        self.restart_clock()

    def _write_row(self, step: int, kept: np.ndarray, param_norm: float, param_norm_clip: float) -> None:
        elapsed_s = time.perf_counter() - self._interval_start
        sums = dict(zip(_COLUMNS, kept.sum(axis=0), strict=True))
        num_rows = len(kept) * self._batch_size
        num_elements = num_rows * self._num_elements
        grad_norms = kept[:, _COLUMNS.index("grad_norm")]
        timestep_mean, timestep_std = _moments(sums["timestep"], sums["timestep_squared"], num_rows)
        for loss in kept[:, 0] / self._batch_size:
            self._smoothed = _SMOOTHING * self._smoothed + (1 - _SMOOTHING) * loss
            self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        row = {
            "step": step,
            "loss": sums["loss"] / num_rows,
            "loss_smoothed": self._smoothed / self._weight,
            "lr": self._lr,
            "grad_norm": grad_norms.mean(),
            "grad_norm_clip": _clipped(grad_norms, self._max_grad_norm).mean(),
            "param_norm": param_norm,
            "param_norm_clip": param_norm_clip,
            "timestep_mean": timestep_mean * self._num_train_timesteps,
            "timestep_std": timestep_std * self._num_train_timesteps,
            "latent_std": _moments(sums["latent"], sums["latent_squared"], num_elements)[1],
            "noise_std": _moments(sums["noise"], sums["noise_squared"], num_elements)[1],
        }
        for q in _QUARTILES:
            rows = sums[f"rows_q{q}"]
            row[f"loss_q{q}"] = sums[f"loss_q{q}"] / rows if rows else None
        row = {name: value if value is None or name == "step" else float(value) for name, value in row.items()}
        self.train_rows.append(row)
        if self._num_timed:
            speed = {
                "step": step,
                "step_time_ms": 1000 * elapsed_s / self._num_timed,
                "samples_per_sec": self._batch_size * self._num_timed / elapsed_s,
                "data_wait": self._data_wait_s / elapsed_s,
                "peak_memory_gib": _peak_memory_gib(),
            }
            self.speed_rows.append(speed)
            per_sec = f"{speed['samples_per_sec']:.1f}"
            self._progress.set_postfix(loss=f"{row['loss']:.4f}", samples_per_sec=per_sec)
            row = {**row, **speed}
        self._log("train", row, step)

    def validation(
        self, step: int, timesteps: list[int], losses: dict[str, list[float]], images: list[Image.Image]
    ) -> None:
        """Note a validation: the held-out loss at `timesteps` by kind of weights (`raw`, `ema`), and its pictures.

        Raises:
            InputError: a loss isn't finite.
        """
        if not all(math.isfinite(loss) for values in losses.values() for loss in values):
            raise InputError(f"the held-out loss isn't finite at step {step}; {self.last_good}: {_ADVICE}")
        row = {f"loss_{kind}": math.fsum(values) / len(values) for kind, values in losses.items()}
        means = ", ".join(f"{loss:.5f} {name.removeprefix('loss_')}" for name, loss in row.items())
        for kind, values in losses.items():
            row |= {f"loss_{kind}_t{t}": loss for t, loss in zip(timesteps, values, strict=True)}
        self.validation_rows.append({"step": step, **row})
        self._log("validation", row, step)
        for number, image in enumerate(images):
            for tracker in self._accelerator.trackers:
                settings = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"validation/sample_{number}": np.asarray(image)[None]}, step=step, **settings)
        if self._accelerator.is_main_process:
            tqdm.write(f"step {step}: held-out loss {means}")

    def has_validated(self, step: int) -> bool:
        """Whether the held-out loss after `step` steps is known."""
        return any(row["step"] == step for row in self.validation_rows)

    def validation_losses(self, step: int) -> dict[str, float]:
        """The held-out loss after `step` steps, by kind of weights (`raw`, `ema`)."""
        (row,) = (row for row in self.validation_rows if row["step"] == step)
        return {kind: row[f"loss_{kind}"] for kind in ("raw", "ema") if f"loss_{kind}" in row}

    def restart_clock(self) -> None:
        """Leave out of the speed what passed since the interval's first step: a validation, or a save."""
        self._interval_start, self._data_wait_s, self._num_timed = time.perf_counter(), 0.0, 0

    def state(self) -> dict:
        """All that a resumed run's log needs, as JSON.

        Raises:
            InputError: a loss or gradient since the last row isn't finite.
        """
        return {
            "train_rows": self.train_rows,
            "speed_rows": self.speed_rows,
            "validation_rows": self.validation_rows,
            "num_skipped_steps": self.num_skipped_steps,
            "skipped": self._skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "flushed_step": self._flushed_step,
            "lr": self._lr,
            "smoothed": (self._smoothed, self._weight),
            "param_norm": self._param_norm,
            "pending": self._read_pending().tolist(),
        }

    def write_curves(self, train_curve: Path, speed_curve: Path, validation_curve: Path) -> None:
        """Write the curves as CSV, which `dvc plots` draws."""
        self._progress.close()
        head = ["step", "loss_raw", "loss_ema"]
        bins = [name for name in self.validation_rows[-1] if name not in head]
        validation = pd.DataFrame(self.validation_rows, columns=head + bins)
        train, speed = pd.DataFrame(self.train_rows), pd.DataFrame(self.speed_rows)
        for path, table in ((train_curve, train), (speed_curve, speed), (validation_curve, validation)):
            write_text(path, table.to_csv(index=False, lineterminator="\n"))

    def _read_pending(self) -> np.ndarray:
        """The interval's steps so far, float64 [steps, columns], summed over the processes."""
        if self._unread:
            fresh = self._accelerator.reduce(torch.stack(self._unread), "sum").double().cpu().numpy()
            self._read, self._unread = np.concatenate([self._read, fresh]), []
        for place, (numbers, skipped) in enumerate(zip(self._read, self._skipped, strict=True)):
            for name, what in (("loss", "loss"), ("grad_norm", "gradient"), ("param_norm", "norm of the weights")):
                if not math.isfinite(numbers[_COLUMNS.index(name)]) and not skipped:
                    step = self._flushed_step + place
                    raise InputError(
                        f"the {what} stopped being finite between steps {step} and {step + 1}; "
                        f"{self.last_good}: {_ADVICE}"
                    )
        self._read[np.array(self._skipped, dtype=bool)] = 0  # not finite, and counted nowhere
        return self._read

    def _log(self, group: str, row: dict, step: int) -> None:
        values = {f"{group}/{name}": value for name, value in row.items() if name != "step" and value is not None}
        self._accelerator.log(values, step=step)


def check_trackers(names: list[str]) -> None:
    """What the trackers need is installed.

    Raises:
        InputError: Weights & Biases isn't.
    """
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise InputError("train.trackers: wandb isn't installed; run `pip install '.[wandb]'`, or leave it out")


def build_trackers(names: list[str], runs: Path, run_name: str, first_step: int) -> list[GeneralTracker]:
    """The trackers by name, for one run; a resumed run goes on in its own curves from `first_step`."""
    trackers: list[GeneralTracker] = []
    if "tensorboard" in names:
        purge = {"purge_step": first_step} if first_step else {}
        trackers.append(TensorBoardTracker(run_name, str(runs), **purge))
    if "wandb" in names:
        runs.mkdir(parents=True, exist_ok=True)
        trackers.append(WandBTracker("sdtrain", name=run_name, id=run_name, resume="allow", dir=str(runs)))
    return trackers


def _moments(total: float, squares: float, count: int) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = total / count
    return mean, max(0.0, squares / count - mean**2) ** 0.5


def _clipped(norms: np.ndarray, max_norm: float) -> np.ndarray:
    """Norms after torch's clip_grad_norm_, which divides by norm + 1e-6."""
    return norms * np.minimum(1.0, max_norm / (norms + 1e-6))


def _peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

"""A run's curves: part of its state, because early stopping and the best checkpoints depend on them.

Every optimizer step passes one small tensor, which stays on the device until the logging interval ends
or a state is saved.
"""

import math
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor

from sdtrain.evaluation.condition_use import unused_at_last
from sdtrain.evaluation.learning import learning_fault
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import write_text
from sdtrain.params.schema import TrainParams
from sdtrain.training.step import QUARTILES, SUMS, StepReport

_SMOOTHING = 0.99
"""Decay, per optimizer step, of the smoothed loss."""
_MAX_SKIPPED = 25
"""Skipped steps in a row: fp16's scale starts at 2¹⁶ and halves at each, so by then no useful scale is left."""
_SPEED = [
    "step", "step_time_ms", "samples_per_sec", "data_wait", "peak_memory_gib", "num_processes", "micro_batch_size",
]  # fmt: skip
"""The speed table's columns, also where no interval was timed."""
_ADVICE = "lower train.lr, set train.max_grad_norm, or use train.precision: bf16 instead of fp16"


class Curves:
    """Collects a run's curves.

    The training curve's columns, each over the interval since the last row:
    `loss`, the mean of the minimised loss; `loss_smoothed`, its moving average over steps (decay 0.99,
    bias-corrected); `lr`, the last step's; `grad_norm`, the mean L2 norm of the full gradient
    before clipping, and `grad_norm_clip` after it; `param_norm`, the L2 norm of all trained weights before
    the interval's last step, and `param_norm_clip` after that step, which uses the clipped gradient;
    `timestep_mean`, `timestep_std`; `latent_std` of the scaled latents; `noise_std` of the target's noise,
    offset included; `loss_q1` to `loss_q4`, the loss where the timestep is in that quarter of the
    schedule, 1 the cleanest (empty where no row did); and the method's logged values, each the mean over rows.

    Timings have a table of their own, because they differ from run to run:
    `step_time_ms`, `samples_per_sec`, both without validation and saving; `data_wait`, the share of that time
    spent waiting for the batch; `peak_memory_gib`, of the GPU, or of the process on a CPU;
    and the interval's `num_processes` and `micro_batch_size`.

    Args:
        logged: the method's further columns.
        restored: what `state` returned when the run was saved.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        params: TrainParams,
        logged: tuple[str, ...],
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
        self._columns = (*SUMS, *logged, "grad_norm", "param_norm")
        self._logged = logged
        self._skipped: list[bool] = restored.get("skipped", [])
        self._skipped_in_a_row: int = restored.get("skipped_in_a_row", 0)
        self._flushed_step: int = restored.get("flushed_step", 0)
        self._smoothed, self._weight = restored.get("smoothed", (0.0, 0.0))
        self._param_norm: float = restored.get("param_norm", 0.0)
        self._read = np.array(restored.get("pending", []), dtype=np.float64).reshape(-1, len(self._columns))
        self._unread: list[Tensor] = []
        self._lr: float = restored.get("lr", 0.0)
        self._accelerator, self._params = accelerator, params
        self._num_elements, self._num_train_timesteps = math.prod(latent_shape), num_train_timesteps
        self._data_wait_s = 0.0
        self._num_timed = 0
        self._interval_start = time.perf_counter()

    @property
    def num_steps(self) -> int:
        """Optimizer steps added so far."""
        return self._flushed_step + len(self._skipped)

    def start(self, step: int, param_norm: float) -> None:
        """Start without earlier rows after `step` steps, with weights of this L2 norm."""
        self._flushed_step, self._param_norm = step, param_norm

    def add_step(self, report: StepReport) -> None:
        """Add one optimizer step, without reading anything from the device.

        Raises:
            InputError: too many steps in a row were skipped.
        """
        # The same in every process; reading sums over them.
        norms = torch.stack([report.grad_norm, report.param_norm]) / self._accelerator.num_processes
        self._unread.append(torch.cat([report.sums, norms]))
        self._skipped.append(report.skipped)
        self._lr = report.lr
        self.num_skipped_steps += report.skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if report.skipped else 0
        if self._skipped_in_a_row == _MAX_SKIPPED:
            raise InputError(
                f"the gradients aren't finite for {_MAX_SKIPPED} steps up to step {self.num_steps}; "
                f"{self.last_good}: {_ADVICE}"
            )
        self._data_wait_s += report.data_wait_s
        self._num_timed += 1

    def flush(self) -> dict | None:
        """End the interval: add a row of its means and return it with its speed; None if it has no step.

        Raises:
            InputError: a loss or gradient of the interval isn't finite.
        """
        numbers = self._read_pending()
        if not len(numbers):
            return None
        step, row = self._flushed_step + len(numbers), None
        kept = numbers[~np.array(self._skipped, dtype=bool)]
        param_norms = [self._param_norm, *numbers[:, self._columns.index("param_norm")]]
        if len(kept):
            row = self._means(step, kept, param_norms[-2], param_norms[-1])
            self.train_rows.append(row)
            if self._num_timed:
                self.speed_rows.append(self._speed(step))
                row = {**row, **self.speed_rows[-1]}
        self._flushed_step, self._param_norm = step, param_norms[-1]
        self._read, self._skipped = self._read[:0], []
        self.restart_clock()
        return row

    def _means(self, step: int, kept: np.ndarray, param_norm: float, param_norm_clip: float) -> dict:
        batch_size, max_grad_norm = self._params.batch_size, self._params.max_grad_norm or math.inf
        sums = dict(zip(self._columns, kept.sum(axis=0), strict=True))
        num_rows = len(kept) * batch_size
        num_elements = num_rows * self._num_elements
        grad_norms = kept[:, self._columns.index("grad_norm")]
        timestep_mean, timestep_std = _moments(sums["timestep"], sums["timestep_squared"], num_rows)
        for loss in kept[:, 0] / batch_size:
            self._smoothed = _SMOOTHING * self._smoothed + (1 - _SMOOTHING) * loss
            self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        row = {
            "step": step,
            "loss": sums["loss"] / num_rows,
            "loss_smoothed": self._smoothed / self._weight,
            "lr": self._lr,
            "grad_norm": grad_norms.mean(),
            "grad_norm_clip": _clipped(grad_norms, max_grad_norm).mean(),
            "param_norm": param_norm,
            "param_norm_clip": param_norm_clip,
            "timestep_mean": timestep_mean * self._num_train_timesteps,
            "timestep_std": timestep_std * self._num_train_timesteps,
            "latent_std": _moments(sums["latent"], sums["latent_squared"], num_elements)[1],
            "noise_std": _moments(sums["noise"], sums["noise_squared"], num_elements)[1],
        }
        for q in QUARTILES:
            rows = sums[f"rows_q{q}"]
            row[f"loss_q{q}"] = sums[f"loss_q{q}"] / rows if rows else None
        row |= {name: sums[name] / num_rows for name in self._logged}
        return {name: value if value is None or name == "step" else float(value) for name, value in row.items()}

    def _speed(self, step: int) -> dict:
        elapsed_s = time.perf_counter() - self._interval_start
        return {
            "step": step,
            "step_time_ms": 1000 * elapsed_s / self._num_timed,
            "samples_per_sec": self._params.batch_size * self._num_timed / elapsed_s,
            "data_wait": self._data_wait_s / elapsed_s,
            "peak_memory_gib": _peak_memory_gib(),
            "num_processes": self._accelerator.num_processes,
            "micro_batch_size": self._params.micro_batch_size,
        }

    def add_validation(
        self, step: int, timesteps: list[int], losses: dict[str, list[float]], gaps: dict[str, float | None]
    ) -> dict:
        """Add the held-out loss at `timesteps` by kind of weights (`raw`, `ema`), and the condition-use gap of the last
        kind by condition; returns the row.

        Raises:
            InputError: a loss isn't finite.
        """
        if not all(math.isfinite(loss) for values in losses.values() for loss in values):
            raise InputError(f"the held-out loss isn't finite at step {step}; {self.last_good}: {_ADVICE}")
        row = {"step": step, **{f"loss_{kind}": math.fsum(values) / len(values) for kind, values in losses.items()}}
        row |= {f"gap_{condition}": gap for condition, gap in gaps.items()}
        for kind, values in losses.items():
            row |= {f"loss_{kind}_t{t}": loss for t, loss in zip(timesteps, values, strict=True)}
        self.validation_rows.append(row)
        return row

    def has_validated(self, step: int) -> bool:
        """Whether the held-out loss after `step` steps is known."""
        return any(row["step"] == step for row in self.validation_rows)

    def validation_losses(self, step: int) -> dict[str, float]:
        """The held-out loss after `step` steps, by kind of weights (`raw`, `ema`)."""
        (row,) = (row for row in self.validation_rows if row["step"] == step)
        return {kind: row[f"loss_{kind}"] for kind in ("raw", "ema") if f"loss_{kind}" in row}

    def unused_conditions(self) -> list[str]:
        """Which conditions the model seems to ignore at the last validation, a sentence each."""
        return list(unused_at_last(self.validation_rows).values())

    def learning_fault(self) -> str | None:
        """Why the run seems to have a wrong learning rate or length, in a sentence."""
        return learning_fault(self.validation_rows, self.train_rows)

    def restart_clock(self) -> None:
        """Exclude the time so far from the interval's speed: a validation, or a save."""
        self._interval_start, self._data_wait_s, self._num_timed = time.perf_counter(), 0.0, 0

    def state(self) -> dict:
        """What a resumed run's curves need, as JSON.

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

    def write(self, train_curve: Path, speed_curve: Path, validation_curve: Path) -> None:
        """Write the curves as CSV, which `dvc plots` draws."""
        head = ["step", "loss_raw", "loss_ema"]
        bins = [name for name in self.validation_rows[-1] if name not in head]
        validation = pd.DataFrame(self.validation_rows, columns=head + bins)
        train, speed = pd.DataFrame(self.train_rows), pd.DataFrame(self.speed_rows, columns=_SPEED)
        for path, table in ((train_curve, train), (speed_curve, speed), (validation_curve, validation)):
            write_text(path, table.to_csv(index=False, lineterminator="\n"))

    def _read_pending(self) -> np.ndarray:
        """The interval's steps so far, float64 [steps, columns], summed over the processes."""
        if self._unread:
            fresh = self._accelerator.reduce(torch.stack(self._unread), "sum").double().cpu().numpy()
            self._read, self._unread = np.concatenate([self._read, fresh]), []
        for place, (numbers, skipped) in enumerate(zip(self._read, self._skipped, strict=True)):
            named = {"loss": "loss", "grad_norm": "gradient", "param_norm": "norm of the weights"}
            for name, what in {**named, **{name: f"logged {name}" for name in self._logged}}.items():
                if not math.isfinite(numbers[self._columns.index(name)]) and not skipped:
                    step = self._flushed_step + place
                    raise InputError(
                        f"the {what} stopped being finite between steps {step} and {step + 1}; "
                        f"{self.last_good}: {_ADVICE}"
                    )
        # A skipped step's sums and gradient aren't finite and don't count; its weights' norm, the last column, does.
        self._read[np.array(self._skipped, dtype=bool), :-1] = 0
        return self._read


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

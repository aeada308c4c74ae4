"""What a run tells while it runs: a progress bar, TensorBoard, and curves for DVC."""

import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sdtrain.errors import InputError
from sdtrain.files import write_text

_NOTHING_SAVED = (
    "nothing was saved: lower train.lr, set train.max_grad_norm, or use train.precision: bf16 in place of fp16"
)


_MAX_SKIPPED = 25
"""Steps in a row: fp16's scale starts at 2¹⁶ and halves at each, so none is left to try."""


class RunLog:
    """Collects a run's curves. Reads numbers off the device once an interval, never at every step."""

    def __init__(self, accelerator: Accelerator, num_steps: int, batch_size: int) -> None:
        self.train_rows: list[dict] = []
        self.validation_rows: list[dict] = []
        self.num_skipped_steps, self._skipped_in_a_row = 0, 0
        self._accelerator, self._batch_size = accelerator, batch_size
        self._losses: list[Tensor] = []
        self._flushed_step, self._interval_start = 0, time.perf_counter()
        hidden = None if accelerator.is_main_process else True  # None hides it where there is no terminal
        self._progress = tqdm(total=num_steps, desc="train", unit="step", disable=hidden)

    def step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, skipped: bool, flush: bool) -> None:
        """Note one optimizer step; `flush` ends the interval and writes its means.

        Args:
            skipped: the loss scaling of fp16 found gradients that aren't finite, and left the weights.

        Raises:
            InputError: a loss of the interval isn't finite, or too many steps in a row were skipped.
        """
        self.num_skipped_steps += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row == _MAX_SKIPPED:
            raise InputError(
                f"the gradients aren't finite for {_MAX_SKIPPED} steps up to step {step}, {_NOTHING_SAVED}"
            )
        self._losses.append(loss)
        self._progress.update()
        if not flush:
            return
        losses = [loss.item() for loss in self._losses]
        if not all(map(math.isfinite, losses)):
            raise InputError(
                f"the loss stopped being finite between steps {self._flushed_step} and {step}, {_NOTHING_SAVED}"
            )
        elapsed = time.perf_counter() - self._interval_start
        row = {"step": step, "loss": sum(losses) / len(losses), "lr": lr, "grad_norm": float(grad_norm)}
        images_per_s = self._batch_size * len(losses) / elapsed
        self.train_rows.append(row)
        self._progress.set_postfix(loss=f"{row['loss']:.4f}", images_per_s=f"{images_per_s:.1f}")
        names = {name: f"train/{name}" for name in ("loss", "lr", "grad_norm")}
        self._accelerator.log({**{names[n]: row[n] for n in names}, "train/images_per_s": images_per_s}, step=step)
        self._losses, self._flushed_step, self._interval_start = [], step, time.perf_counter()

    def validation(self, step: int, losses: dict[str, float], images: list[Image.Image]) -> None:
        """Note a validation: held-out loss by kind of weights (`raw`, `ema`), and its pictures.

        Raises:
            InputError: a loss isn't finite.
        """
        if not all(map(math.isfinite, losses.values())):
            raise InputError(f"the held-out loss isn't finite at step {step}, {_NOTHING_SAVED}")
        self.validation_rows.append({"step": step, **{f"loss_{kind}": loss for kind, loss in losses.items()}})
        self._accelerator.log({f"validation/loss_{kind}": loss for kind, loss in losses.items()}, step=step)
        if images:
            for tracker in self._accelerator.trackers:
                tracker.log_images({"validation/samples": np.stack(images)}, step=step, dataformats="NHWC")
        tqdm.write(f"step {step}: held-out loss " + ", ".join(f"{loss:.5f} {kind}" for kind, loss in losses.items()))
        self._interval_start = time.perf_counter()

    def write_curves(self, train_curve: Path, validation_curve: Path) -> None:
        """Write both curves as CSV, which `dvc plots` draws."""
        self._progress.close()
        validation = pd.DataFrame(self.validation_rows, columns=["step", "loss_raw", "loss_ema"])
        for path, table in ((train_curve, pd.DataFrame(self.train_rows)), (validation_curve, validation)):
            write_text(path, table.to_csv(index=False, lineterminator="\n"))

"""What a run shows while it trains: a progress bar, and TensorBoard or Weights & Biases. None of it is state."""

from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image
from tqdm import tqdm


class Trackers:
    """Shows a run's rows and images as they come.

    Args:
        first_step: steps already made; a resumed run's curves continue from there.
        resumed: whether the trackers have earlier rows of this run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        names: list[str],
        runs: Path,
        run_name: str,
        *,
        first_step: int,
        num_steps: int,
        resumed: bool,
    ) -> None:
        accelerator.log_with = _build(names, runs, run_name, first_step + 1 if resumed else 0)
        accelerator.init_trackers(run_name)
        self._accelerator = accelerator
        hidden = None if accelerator.is_main_process else True  # None hides it if there is no terminal
        self._progress = tqdm(total=num_steps, initial=first_step, desc="train", unit="step", disable=hidden)

    def step(self) -> None:
        """Move the progress bar by one step."""
        self._progress.update()

    def train_row(self, row: dict | None) -> None:
        """Log a row of the training curve, with its speed; None is no row."""
        if row is None:
            return
        if "samples_per_sec" in row:
            shown = {"loss": f"{row['loss']:.4f}", "samples_per_sec": f"{row['samples_per_sec']:.1f}"}
            self._progress.set_postfix(shown)
        self._log("train", row)

    def validation_row(self, row: dict, images: list[Image.Image]) -> None:
        """Log a validation and its images."""
        self._log("validation", row)
        for number, image in enumerate(images):
            for tracker in self._accelerator.trackers:
                settings = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tag = f"validation/sample_{number}"
                tracker.log_images({tag: np.asarray(image)[None]}, step=row["step"], **settings)
        if self._accelerator.is_main_process:
            means = ", ".join(f"{row[f'loss_{kind}']:.5f} {kind}" for kind in ("raw", "ema") if f"loss_{kind}" in row)
            tqdm.write(f"step {row['step']}: held-out loss {means}")

    def close(self) -> None:
        """Close the trackers and the progress bar."""
        self._accelerator.end_training()
        self._progress.close()

    def _log(self, group: str, row: dict) -> None:
        values = {f"{group}/{name}": value for name, value in row.items() if name != "step" and value is not None}
        self._accelerator.log(values, step=row["step"])


def _build(names: list[str], runs: Path, run_name: str, first_step: int) -> list[GeneralTracker]:
    """One run's trackers; a resumed run continues its own curves from `first_step`."""
    trackers: list[GeneralTracker] = []
    if "tensorboard" in names:
        purge = {"purge_step": first_step} if first_step else {}
        trackers.append(TensorBoardTracker(run_name, str(runs), **purge))
    if "wandb" in names:
        runs.mkdir(parents=True, exist_ok=True)
        trackers.append(WandBTracker("sdtrain", name=run_name, id=run_name, resume="allow", dir=str(runs)))
    return trackers

"""Overfits one batch: the first thing to try when a run learns nothing.

The same few rows, with the same noise and timesteps, are trained on repeatedly. A correct set-up
drives their loss to nearly 0 in a few hundred steps; one that doesn't has a fault that no amount
of data fixes: the learning rate, the prediction type, the scaling, a UNet that isn't trained.
"""

from dataclasses import replace

import torch
from tqdm import tqdm

from sdtrain.data.batches import Batch, BatchMaker
from sdtrain.ground.errors import InputError
from sdtrain.params.schema import Params
from sdtrain.training.devices import build_accelerator
from sdtrain.training.files import TrainFiles
from sdtrain.training.optimizer import build_lr_scheduler, peak_lr
from sdtrain.training.step import optimizer_step
from sdtrain.training.trainer import build_trainer

_SHARE = 0.1
"""Of the first loss; the last one must be below that."""


def overfit_batch(params: Params, files: TrainFiles, num_rows: int, num_steps: int) -> float:
    """Train on the first `num_rows` rows `num_steps` times at a constant learning rate.

    Returns the last loss over the first; prints the loss during training, and writes no files.

    Raises:
        InputError: the loss didn't fall below a tenth of its first value.
    """
    train = params.train.model_copy(
        update={
            "batch_size": num_rows,
            "micro_batch_size": num_rows,
            "lr": peak_lr(params.train),
            "lr_scaling": "none",
            "lr_reference_batch_size": None,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "use_ema": False,
        }
    )
    trainer = build_trainer(params.model_copy(update={"train": train}), files, build_accelerator(train))
    trainer = replace(trainer, batches=_OneBatch(trainer.batches))
    lr_scheduler = build_lr_scheduler(trainer.optimizer, train, num_steps, num_done=0)
    losses = []
    for step in range(num_steps):
        losses.append(optimizer_step(trainer, lr_scheduler, step).sums[0].item() / num_rows)
        if step % max(1, num_steps // 10) == 0 or step == num_steps - 1:
            tqdm.write(f"step {step + 1}: loss {losses[-1]:.5f}")
    share = losses[-1] / losses[0]
    if not share < _SHARE:
        raise InputError(
            f"one batch of {num_rows} can't be overfitted: its loss went from {losses[0]:.4f} to {losses[-1]:.4f} in "
            f"{num_steps} steps; try another train.lr (it is {train.lr:g}), then look at train.prediction_type"
        )
    print(f"one batch of {num_rows} is learned: its loss fell to {share:.1%} of its first value")
    return share


class _OneBatch:
    """Returns a BatchMaker's first batch at every step."""

    def __init__(self, batches: BatchMaker) -> None:
        self._batches = batches

    def make(self, step: int, positions: range, device: torch.device) -> Batch:
        return self._batches.make(0, positions, device)

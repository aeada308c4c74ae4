"""One optimizer step: algorithm 1 of Ho et al. 2020, in micro-batches.

Draw x₀ (from the VAE's posterior), t and ε; noise; predict; compare; step.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LRScheduler

from sdtrain.data.batches import Batch
from sdtrain.ground import randomness
from sdtrain.training.devices import attention
from sdtrain.training.trainer import Trainer

QUARTILES = range(1, 5)
SUMS = (
    "loss", *(f"loss_q{q}" for q in QUARTILES), *(f"rows_q{q}" for q in QUARTILES),
    "timestep", "timestep_squared", "latent", "latent_squared", "noise", "noise_squared",
)  # fmt: skip
"""What is summed over a step's rows; the method's logged values follow."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step reports."""

    sums: Tensor
    """`SUMS` and the method's `logged` over this process's rows, float32 on the device."""
    grad_norm: Tensor
    """L2 norm of the gradient over all processes, before clipping; a scalar on the device."""
    param_norm: Tensor
    """L2 norm of the weights after the step; a scalar on the device."""
    lr: float
    """The learning rate of the step."""
    skipped: bool
    """Whether fp16's loss scaling found gradients that aren't finite, and left the weights unchanged."""
    data_wait_s: float
    """Seconds spent waiting for batches."""


def optimizer_step(trainer: Trainer, lr_scheduler: LRScheduler, step: int) -> StepReport:
    """The step after `step` steps: micro-batches, clipping, AdamW, schedule, EMA."""
    accelerator, device, weights = trainer.accelerator, trainer.accelerator.device, trainer.weights.values()
    sums, data_wait_s = torch.zeros(len(SUMS) + len(trainer.method.logged), device=device), 0.0
    for micro in range(trainer.num_micro_batches):
        positions = trainer.positions(micro)
        started = time.perf_counter()
        batch = trainer.batches.make(step, positions, device)
        data_wait_s += time.perf_counter() - started
        last_batch = micro == trainer.num_micro_batches - 1
        sums += _backward(trainer, batch, step, positions.start, last_batch)
    grad_norm = accelerator.clip_grad_norm_(weights, trainer.params.train.max_grad_norm or float("inf"))
    lr = lr_scheduler.get_last_lr()[0]
    trainer.optimizer.step()
    skipped = trainer.optimizer.step_was_skipped  # by fp16's loss scaling, which then tries a smaller scale
    if not skipped:
        lr_scheduler.step()
        if trainer.ema is not None:
            trainer.ema.step(weights)
    trainer.optimizer.zero_grad(set_to_none=True)
    return StepReport(sums, grad_norm, weights_norm(trainer), lr, skipped, data_wait_s)


def _backward(trainer: Trainer, batch: Batch, step: int, first_position: int, last_batch: bool) -> Tensor:
    """Forward and backward of every loss pass over one micro-batch; returns its sums."""
    accelerator, method, train = trainer.accelerator, trainer.method, trainer.params.train
    losses, logged = 0, dict.fromkeys(method.logged, torch.zeros((), device=accelerator.device))
    for number, loss_pass in enumerate(method.losses):
        # For models that have dropout of their own.
        torch.manual_seed(randomness.integer(trainer.params.train.seed, "dropout", step, first_position, number))
        syncs = last_batch and number == len(method.losses) - 1
        synced = nullcontext() if syncs else accelerator.no_sync(trainer.model)
        with synced, attention(train.attention_backend):
            with accelerator.autocast():
                values = loss_pass(trainer.model, batch, trainer.objective)
            accelerator.backward(values["loss"].mean() / trainer.num_micro_batches)
        losses = losses + values["loss"].detach()
        logged |= {name: value.detach().float().sum() for name, value in values.items() if name != "loss"}
    return torch.cat([_sums(batch, losses, len(trainer.objective.alphas_cumprod)), *(v[None] for v in logged.values())])


def _sums(batch: Batch, losses: Tensor, num_train_timesteps: int) -> Tensor:
    """`SUMS` over one micro-batch: the loss, also by quartile of the timesteps, and statistics of the inputs.

    Args:
        losses: of each row, [B].
    """
    share = batch.timesteps.float() / num_train_timesteps
    in_quartile = ((share * 4).long()[:, None] == torch.arange(4, device=losses.device)).float()
    by_quartile = (in_quartile * losses[:, None]).sum(0)
    moments = (share, batch.latents, batch.noise)
    sums = [sum for values in moments for sum in (values.sum(), values.square().sum())]
    return torch.cat([losses.sum()[None], by_quartile, in_quartile.sum(0), torch.stack(sums)])


def weights_norm(trainer: Trainer) -> Tensor:
    """L2 norm of all trained weights, a scalar on their device."""
    return get_total_norm([p.detach() for p in trainer.weights.values()])

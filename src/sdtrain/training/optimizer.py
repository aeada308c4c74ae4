"""The optimizer, its learning rate's schedule, and the number of steps."""

import math
from collections.abc import Iterable

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sdtrain.ground.errors import InputError
from sdtrain.ground.schedules import scaled_lr
from sdtrain.params.schema import TrainParams

OPEN_ENDED = ("constant", "constant_with_warmup", "piecewise_constant")
"""Schedules whose rate at a step doesn't depend on the run's length, so a run can be extended."""

_FUSED = ("cuda", "cpu", "mps", "xpu")
"""Devices for which PyTorch has a fused AdamW."""


def build_optimizer(weights: Iterable[nn.Parameter], params: TrainParams, device: torch.device) -> Optimizer:
    """AdamW over the trained weights."""
    settings = {
        "lr": peak_lr(params),
        "betas": (params.adam_beta1, params.adam_beta2),
        "eps": params.adam_epsilon,
        "weight_decay": params.weight_decay,
    }
    if params.optimizer == "adamw":
        # Under fp16's loss scaling the fused kernel doesn't report a skipped step, which the schedule must know.
        fused = device.type in _FUSED and params.precision != "fp16"
        return torch.optim.AdamW(weights, **settings, fused=fused)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights, **settings)


def build_lr_scheduler(optimizer: Optimizer, params: TrainParams, num_steps: int, num_done: int) -> LRScheduler:
    """Diffusers' schedule over `num_steps`, of which `num_done` are done."""
    if num_done:  # torch then needs the schedule's peak rate
        for group in optimizer.param_groups:
            group["initial_lr"] = peak_lr(params)
    return get_scheduler(
        params.lr_scheduler,
        optimizer,
        step_rules=params.lr_step_rules,
        num_warmup_steps=params.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=params.lr_num_cycles,
        power=params.lr_power,
        last_epoch=num_done - 1,
    )


def peak_lr(params: TrainParams) -> float:
    """The scheduler's peak learning rate."""
    return scaled_lr(params.lr, params.lr_scaling, params.batch_size, params.lr_reference_batch_size)


def count_steps(params: TrainParams, num_train: int) -> int:
    """Optimizer steps of the full run."""
    return params.max_steps or math.ceil(params.max_epochs * num_train / params.batch_size)


def check_warmup(params: TrainParams, num_steps: int) -> None:
    """Check that the warm-up ends before the schedule's `num_steps`.

    Raises:
        InputError: it doesn't.
    """
    if params.lr_warmup_steps >= num_steps:
        raise InputError(
            f"train.lr_warmup_steps = {params.lr_warmup_steps}: must be below the {num_steps} steps that the "
            "learning rate's schedule spans"
        )

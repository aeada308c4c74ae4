"""What a training run works on, built from params and folders."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim import Optimizer

from sdtrain.data.batches import BatchMaker
from sdtrain.data.shards import LatentShards
from sdtrain.ground import randomness
from sdtrain.ground.diffusion import Objective
from sdtrain.ground.manifests import encoders_fingerprint
from sdtrain.methods import build_method, first_parts
from sdtrain.methods.method import Method, enable_gradient_checkpointing, trained_parameters
from sdtrain.models.ema import build_ema
from sdtrain.models.parts import Parts, load_parts, tokenize, training_scheduler
from sdtrain.params.machine import check_device, count_micro_batches
from sdtrain.params.schema import Params
from sdtrain.training.files import TrainFiles
from sdtrain.training.optimizer import build_optimizer


@dataclass
class Trainer:
    """The parts of one run, on their device."""

    params: Params
    accelerator: Accelerator
    parts: Parts
    method: Method
    model: nn.Module
    """`method.trained`, wrapped for several processes."""
    weights: dict[str, nn.Parameter]
    """What trains, by name."""
    batches: BatchMaker
    num_micro_batches: int
    """Forward passes per process and optimizer step."""
    scheduler: DDPMScheduler
    """The noise schedule for training; `parts.scheduler` is the base's own."""
    objective: Objective
    optimizer: Optimizer
    ema: EMAModel | None

    @property
    def share(self) -> tuple[int, int]:
        """This process's share of work that is split by rows: (its index, their number)."""
        return self.accelerator.process_index, self.accelerator.num_processes

    def positions(self, micro: int) -> range:
        """The rows of the effective batch that this process takes in its `micro`-th pass."""
        index, num_processes = self.share
        size = self.params.train.micro_batch_size
        first = (micro * num_processes + index) * size
        return range(first, first + size)


def build_trainer(params: Params, files: TrainFiles, accelerator: Accelerator) -> Trainer:
    """Load the base, and build method, optimizer, EMA and batches around it.

    Raises:
        InputError: cache, base and method don't match, or the device doesn't support a param.
    """
    train, device = params.train, accelerator.device
    check_device(train, device.type)
    num_micro_batches = count_micro_batches(train, accelerator.num_processes)
    shards = LatentShards(files.latents, "train", encoders_fingerprint(files.base))
    parts = load_parts(files.base, first_parts(params.method, files.base))
    scheduler = training_scheduler(parts.scheduler, train.prediction_type, train.zero_terminal_snr)
    parts.set_resolution(params.precompute.resolution)
    torch.manual_seed(randomness.integer(train.seed, "method"))  # for modules that start at random, on the CPU
    method = build_method(params.method, parts)
    parts.to(device)
    method.trained.to(device).train()
    assert not list(method.trained.buffers()), "a saved state holds parameters; buffers would be lost"
    if train.gradient_checkpointing:
        enable_gradient_checkpointing((*parts.modules(), method.trained))
    if train.compile:
        for module in dict.fromkeys((method.trained, parts.unet)):
            module.compile()
    weights = trained_parameters(method)
    model, optimizer = accelerator.prepare(method.trained, build_optimizer(weights.values(), train, device))
    return Trainer(
        params=params,
        accelerator=accelerator,
        parts=parts,
        method=method,
        model=model,
        weights=weights,
        batches=BatchMaker(
            shards,
            train,
            num_train_timesteps=scheduler.config.num_train_timesteps,
            scaling_factor=parts.vae.config.scaling_factor,
            null_ids=tokenize(parts.tokenizer, [""])[0],
            columns=method.columns,
        ),
        num_micro_batches=num_micro_batches,
        scheduler=scheduler,
        objective=Objective(scheduler.alphas_cumprod.to(device), train.prediction_type, train.snr_gamma),
        optimizer=optimizer,
        ema=build_ema(weights.values(), train),
    )

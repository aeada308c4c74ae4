"""What a training run works on, put together from params and folders."""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers import CLIPTextModel, CLIPTokenizer

from sdtrain.batches import BatchMaker
from sdtrain.costs import Costs, training_costs
from sdtrain.ema import build_ema
from sdtrain.errors import InputError
from sdtrain.heldout import HeldOut
from sdtrain.manifests import encoders_fingerprint
from sdtrain.models import (
    load_scheduler,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    load_vae,
    tokenize,
    training_scheduler,
)
from sdtrain.optimization import build_optimizer, count_micro_batches
from sdtrain.params import TrainParams
from sdtrain.shards import LatentShards

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_ON_CPU = ("auto", "flash", "math")


@dataclass
class Setup:
    """The parts of one run, on their device."""

    params: TrainParams
    seed: int
    base: Path
    accelerator: Accelerator
    batches: BatchMaker
    num_micro_batches: int
    """Forward passes per process and optimizer step."""
    unet: UNet2DConditionModel
    model: torch.nn.Module
    """`unet`, wrapped for several processes."""
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler
    """The noise schedule that is trained on."""
    base_scheduler: DDPMScheduler
    """The one that the base was trained on."""
    alphas_cumprod: torch.Tensor
    """ᾱ of `scheduler`, float32 [T]."""
    optimizer: Optimizer
    ema: EMAModel | None
    costs: Costs


def build_accelerator(params: TrainParams) -> Accelerator:
    """Devices, processes and precision, once their number is what the environment asked for.

    Raises:
        InputError: fp16 without a GPU; another number of processes than `NPROC` and `NNODES` say, or
            `accelerate launch` doesn't say it.
    """
    if params.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("train.precision = 'fp16': needs a CUDA GPU, and there is none; use 'bf16' or 'fp32'")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
    torch.use_deterministic_algorithms(params.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing reads such memory
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
        raise InputError(
            "`accelerate launch` doesn't tell how many processes it was asked for, and on CPUs it starts one whatever "
            "that was; start the run as `NPROC=… python -m stages.train`, or with torchrun"
        )
    accelerator = Accelerator(
        mixed_precision="no" if params.precision == "fp32" else params.precision,
        cpu=not torch.accelerator.is_available(),  # Accelerate joins processes on CPUs only where it is told so
    )
    if "NPROC" in os.environ:
        expected = int(os.environ["NPROC"]) * int(os.environ.get("NNODES", 1))
    else:
        expected = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != expected:
        raise InputError(
            f"the environment asks for {expected} processes (NPROC × NNODES, or WORLD_SIZE), this run has "
            f"{accelerator.num_processes}; start it as `NPROC=… python -m stages.train` or with torchrun"
        )
    return accelerator


def prepare(params: TrainParams, seed: int, base: Path, latents: Path, accelerator: Accelerator) -> Setup:
    """Load the base, and build optimizer, average and batches around it.

    Raises:
        InputError: cache and base don't belong together, or a param asks for what the device can't do.
    """
    device = accelerator.device
    _check_attention(params, device)
    shards = LatentShards(latents, "train", encoders_fingerprint(base))
    num_micro_batches = count_micro_batches(params, accelerator.num_processes)
    unet, text_encoder, vae = load_unet(base / "unet"), load_text_encoder(base), load_vae(base)
    tokenizer, base_scheduler = load_tokenizer(base), load_scheduler(base)
    scheduler = training_scheduler(base, params.prediction_type, params.zero_terminal_snr)
    # So that the UNet draws pictures of the training's size; pipelines reset that of UNets before Diffusers 0.9.
    unet.register_to_config(sample_size=shards.manifest["shape"][-1], _diffusers_version=diffusers.__version__)
    for part in (unet, text_encoder, vae):
        part.to(device)
    unet.requires_grad_(True).train()
    if params.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if params.compile:
        _check_compiler()
        unet.compile()
    optimizer = build_optimizer(unet, params, device)
    model, optimizer = accelerator.prepare(unet, optimizer)
    frozen = [p for part in (text_encoder, vae) for p in part.parameters()]
    return Setup(
        params=params,
        seed=seed,
        base=base,
        accelerator=accelerator,
        batches=BatchMaker(
            shards,
            params,
            seed,
            num_train_timesteps=scheduler.config.num_train_timesteps,
            scaling_factor=vae.config.scaling_factor,
            null_ids=tokenize(tokenizer, [""])[0],
        ),
        num_micro_batches=num_micro_batches,
        unet=unet,
        model=model,
        text_encoder=text_encoder,
        vae=vae,
        tokenizer=tokenizer,
        scheduler=scheduler,
        base_scheduler=base_scheduler,
        alphas_cumprod=scheduler.alphas_cumprod.to(device),
        optimizer=optimizer,
        ema=build_ema(unet, params),
        costs=training_costs(
            dict(unet.config),
            tuple(shards.manifest["shape"]),
            sequence_length=tokenizer.model_max_length,
            micro_batch_size=params.micro_batch_size,
            precision=params.precision,
            gradient_checkpointing=params.gradient_checkpointing,
            optimizer=params.optimizer,
            use_ema=params.use_ema,
            frozen_parameters=sum(p.numel() for p in frozen),
        ),
    )


def part_of(s: Setup) -> tuple[int, int]:
    """This process's share of work that is split by rows: (its index, their number)."""
    return s.accelerator.process_index, s.accelerator.num_processes


def weights_norm(s: Setup) -> torch.Tensor:
    """L2 norm of all trained weights, a scalar on their device."""
    return get_total_norm([p.detach() for p in s.unet.parameters()])


def held_out_losses(s: Setup, held_out: HeldOut, scheduler: DDPMScheduler) -> list[float]:
    """Mean held-out loss of the UNet at each timestep, computed by all processes together."""
    part = held_out.losses(s.unet, scheduler, part_of(s))
    return s.accelerator.reduce(part, "sum").mean(dim=0).tolist()


def attention(backend: str) -> AbstractContextManager:
    """Within the context PyTorch's attention uses this kernel; `auto` leaves the choice to PyTorch."""
    return nullcontext() if backend == "auto" else sdpa_kernel(_BACKENDS[backend])


def _check_attention(params: TrainParams, device: torch.device) -> None:
    backend = params.attention_backend
    if device.type == "cpu" and backend not in _ON_CPU:
        raise InputError(f"train.attention_backend = {backend!r}: needs a GPU; on a CPU there are {', '.join(_ON_CPU)}")
    if device.type == "cuda" and backend in ("flash", "cudnn") and params.precision == "fp32":
        raise InputError(
            f"train.attention_backend = {backend!r}: on a GPU that kernel computes in 16 bit only, and "
            "train.precision = 'fp32'; use bf16, or another backend"
        )


def _check_compiler() -> None:
    names = [os.environ.get("CXX"), "g++", "c++", "clang++"]
    if not any(name and shutil.which(name) for name in names):
        raise InputError("train.compile = True: torch.compile needs a C++ compiler (g++), and there is none; use false")

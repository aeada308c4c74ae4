"""Devices, processes, precision and kernels of a run."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdtrain.ground.errors import InputError
from sdtrain.params.machine import check_device, count_processes
from sdtrain.params.schema import TrainParams

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def build_accelerator(params: TrainParams) -> Accelerator:
    """Devices, processes and precision, once their number is what the environment asked for.

    Raises:
        InputError: a param asks for what the machine can't do; another number of processes than `NPROC` and
            `NNODES` say, or `accelerate launch` doesn't say it.
    """
    check_device(params)
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
    expected = count_processes()
    if accelerator.num_processes != expected:
        raise InputError(
            f"the environment asks for {expected} processes (NPROC × NNODES, or WORLD_SIZE), this run has "
            f"{accelerator.num_processes}; start it as `NPROC=… python -m stages.train` or with torchrun"
        )
    return accelerator


def attention(backend: str) -> AbstractContextManager:
    """Within the context PyTorch's attention uses this kernel; `auto` leaves the choice to PyTorch."""
    return nullcontext() if backend == "auto" else sdpa_kernel(_BACKENDS[backend])

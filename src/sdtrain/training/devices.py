"""Devices, processes, precision and kernels of a run."""

import os
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

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
    """Set up devices, processes and precision; checks that there are as many processes as the environment asks for.

    Raises:
        InputError: the machine doesn't support a param; the number of processes doesn't match `NPROC` and
            `NNODES`, or was set with `accelerate launch`, which doesn't pass it on.
    """
    check_device(params)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
    torch.use_deterministic_algorithms(params.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing reads such memory
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
        raise InputError(
            "`accelerate launch` doesn't pass on how many processes it was asked for, and on CPUs always starts "
            "one; start the run as `NPROC=… python -m stages.train`, or with torchrun"
        )
    accelerator = Accelerator(
        mixed_precision="no" if params.precision == "fp32" else params.precision,
        cpu=not torch.accelerator.is_available(),  # Accelerate joins processes on CPUs only with this flag
    )
    expected = count_processes()
    if accelerator.num_processes != expected:
        raise InputError(
            f"the environment asks for {expected} processes (NPROC × NNODES, or WORLD_SIZE), this run has "
            f"{accelerator.num_processes}; start it as `NPROC=… python -m stages.train` or with torchrun"
        )
    return accelerator


def device_name(device: torch.device) -> str:
    """What people call it, e.g. `NVIDIA H200`; of a CPU the processor's name, where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def attention(backend: str) -> AbstractContextManager:
    """Within the context PyTorch's attention uses this kernel; `auto` leaves the choice to PyTorch."""
    return nullcontext() if backend == "auto" else sdpa_kernel(_BACKENDS[backend])

"""Devices, processes, precision and kernels of a run."""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdtrain.errors import InputError
from sdtrain.params import TrainParams

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_ON_CPU = ("auto", "flash", "math")


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


def attention(backend: str) -> AbstractContextManager:
    """Within the context PyTorch's attention uses this kernel; `auto` leaves the choice to PyTorch."""
    return nullcontext() if backend == "auto" else sdpa_kernel(_BACKENDS[backend])


def check_attention(params: TrainParams, device: torch.device) -> None:
    """Check that the device has the attention kernel that the params ask for.

    Raises:
        InputError: it doesn't, or not at this precision.
    """
    backend = params.attention_backend
    if device.type == "cpu" and backend not in _ON_CPU:
        raise InputError(f"train.attention_backend = {backend!r}: needs a GPU; on a CPU there are {', '.join(_ON_CPU)}")
    if device.type == "cuda" and backend in ("flash", "cudnn") and params.precision == "fp32":
        raise InputError(
            f"train.attention_backend = {backend!r}: on a GPU that kernel computes in 16 bit only, and "
            "train.precision = 'fp32'; use bf16, or another backend"
        )


def check_compiler() -> None:
    """Check that torch.compile finds a C++ compiler.

    Raises:
        InputError: it doesn't.
    """
    names = [os.environ.get("CXX"), "g++", "c++", "clang++"]
    if not any(name and shutil.which(name) for name in names):
        raise InputError("train.compile = True: torch.compile needs a C++ compiler (g++), and there is none; use false")

"""What `params.yaml` needs of this machine, checked before anything is downloaded or computed.

The stages up to `train` check it, so that a run that couldn't train is refused by the first stage. Later stages don't:
a model that was trained elsewhere can be exported and sampled anywhere. torch is imported only if a param depends on
the device, so that `base` and `dataset` start in a second.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sdtrain.ground.errors import InputError
from sdtrain.params.load import load_params
from sdtrain.params.schema import Params, TrainParams

_ON_CPU = ("auto", "flash", "math")
"""Attention kernels that PyTorch has for CPUs."""
_SIXTEEN_BIT = ("flash", "cudnn")
"""Attention kernels that on a CUDA GPU compute in 16 bit only."""

SWEEP_TASK = "SDTRAIN_SWEEP_TASK"
"""Environment variable of all processes of a sweep's task: the path of its lock file, by which they are found once
their dvc is dead."""


def load_trainable_params(path: Path) -> Params:
    """Read and check a params file, and check that this machine can train with it.

    Raises:
        InputError: names every fault of the file, or of the machine.
    """
    params = load_params(path)
    check_machine(params.train)
    return params


def check_machine(params: TrainParams) -> None:
    """Check that this machine has the processes, the device and the packages that training needs.

    Raises:
        InputError: one message that names every fault.
    """
    faults = []
    checks = (
        partial(check_processes, params),
        partial(check_device, params),
        partial(check_trackers, params.trackers),
    )
    for check in checks:
        try:
            check()
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))


def launch_numbers() -> tuple[int, int]:
    """Processes per machine, and machines: `NPROC` and `NNODES`.

    Raises:
        InputError: one isn't a whole number of 1 or more.
    """
    numbers = {name: os.environ.get(name, "1") for name in ("NPROC", "NNODES")}
    for name, text in numbers.items():
        if not text.isdecimal() or int(text) < 1:
            raise InputError(f"{name} = {text!r}: must be a whole number of 1 or more")
    return int(numbers["NPROC"]), int(numbers["NNODES"])


def count_processes() -> int:
    """Processes that train together: `NPROC` × `NNODES`, or torchrun's `WORLD_SIZE` if only that is set.

    Raises:
        InputError: `NPROC` or `NNODES` isn't a whole number of 1 or more.
    """
    num_processes, num_nodes = launch_numbers()
    if "NPROC" not in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return num_processes * num_nodes


def count_micro_batches(params: TrainParams, num_processes: int) -> int:
    """Forward passes per process and step.

    Raises:
        InputError: the effective batch can't be split evenly.
    """
    per_pass = params.micro_batch_size * num_processes
    if params.batch_size % per_pass:
        raise InputError(
            f"train.batch_size = {params.batch_size}: can't be split into micro-batches of "
            f"{params.micro_batch_size} on {num_processes} processes; take a multiple of "
            f"{per_pass}, or lower train.micro_batch_size"
        )
    return params.batch_size // per_pass


def check_processes(params: TrainParams) -> None:
    """Check that the effective batch can be split among the processes, and that each has its own GPU if there are any.

    Raises:
        InputError: it can't, there are too few GPUs, or `NPROC` or `NNODES` isn't a number.
    """
    count_micro_batches(params, count_processes())
    num_here, _ = launch_numbers()
    if num_here > 1:
        import torch

        if torch.cuda.is_available() and num_here > (found := torch.cuda.device_count()):
            raise InputError(
                f"NPROC = {num_here}: each process needs its own CUDA GPU, and this machine has {found}; lower NPROC"
            )


def check_device(params: TrainParams, device_type: str | None = None) -> None:
    """Check that the device supports what the params ask for.

    Args:
        device_type: `cuda`, `cpu`, …; by default that of this machine's accelerator, or the CPU.

    Raises:
        InputError: names everything that it doesn't support, and each missing package or compiler.
    """
    if faults := list(_device_faults(params, device_type)):
        raise InputError("\n".join(faults))


def _device_faults(params: TrainParams, device_type: str | None) -> Iterator[str]:
    if params.compile and not shutil.which(_compiler()):
        yield (
            f"train.compile = True: torch.compile needs a C++ compiler, and {_compiler()!r} wasn't found; install it, "
            "set CXX to another one in the environment, or use false"
        )
    if (params.precision, params.optimizer, params.attention_backend) == ("fp32", "adamw", "auto"):
        return  # every device has these, so torch needn't be imported
    import torch

    device_type = device_type or _device_type()
    if params.precision == "fp16" and device_type != "cuda":
        yield "train.precision = 'fp16': needs a CUDA GPU, and there is none; use 'bf16' or 'fp32'"
    if params.precision == "bf16" and device_type == "cuda" and not torch.cuda.is_bf16_supported():
        yield "train.precision = 'bf16': this GPU doesn't support it; use 'fp16' or 'fp32'"
    if params.optimizer == "adamw_8bit" and device_type != "cuda":
        yield f"train.optimizer = 'adamw_8bit': needs a CUDA GPU, this run is on the {device_type}; use 'adamw'"
    elif params.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        yield (
            "train.optimizer = 'adamw_8bit': bitsandbytes isn't installed; run `pip install '.[8bit]'`, or use 'adamw'"
        )
    backend = params.attention_backend
    if device_type == "cpu" and backend not in _ON_CPU:
        yield f"train.attention_backend = {backend!r}: needs a GPU; on a CPU there are {', '.join(_ON_CPU)}"
    if device_type == "cuda" and backend in _SIXTEEN_BIT and params.precision == "fp32":
        yield (
            f"train.attention_backend = {backend!r}: on a GPU that kernel computes in 16 bit only, and "
            "train.precision = 'fp32'; use bf16, or another backend"
        )


def check_trackers(names: list[str]) -> None:
    """Check that the trackers' packages are installed.

    Raises:
        InputError: Weights & Biases isn't.
    """
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise InputError("train.trackers: wandb isn't installed; run `pip install '.[wandb]'`, or leave it out")


def _compiler() -> str:
    """The one C++ compiler that torch.compile tries (cpp.cxx in torch/_inductor/config.py)."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def _device_type() -> str:
    """Type of the device that Accelerate takes."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"

"""What a training run needs in memory and on disk, estimated without allocating or computing anything.

Weights and the states of optimizer and EMA are counted. Activations are measured: one micro-batch goes
forward and backward through the method's loss passes on torch's meta device, whose tensors have a shape, a dtype
and a lifetime but no data, while the bytes alive at the same time are summed.
"""

import math
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from sdtrain.data.batches import Batch
from sdtrain.ground.diffusion import Objective
from sdtrain.ground.errors import InputError
from sdtrain.methods import build_method
from sdtrain.methods.method import AUTOCASTS, Method, enable_gradient_checkpointing, trained_parameters
from sdtrain.models.parts import Configs, meta_parts, read_configs
from sdtrain.params.schema import Params, Section, TrainParams

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# The UNet's part of CUDA autocast's lists (ATen/autocast_mode.h); the CPU's autocast casts none of _IN_FP32.
_IN_LOW_PRECISION = frozenset({F.linear, F.conv2d})
_IN_FP32 = frozenset({F.layer_norm, F.group_norm, F.interpolate})


@dataclass(frozen=True)
class Costs:
    """Bytes of one process; with several, DDP holds a second copy of the gradients, in buckets."""

    num_parameters: int
    """Trained ones only."""
    weights_bytes: int
    """Trained weights only."""
    gradients_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    frozen_bytes: int
    """All other weights: the VAE, the text encoder, and the UNet's untrained ones."""
    activations_bytes: int
    """Peak of the forward and backward pass of one micro-batch, on top of all the above."""

    @property
    def lasting_bytes(self) -> int:
        """Memory held from the first step to the last, whatever the batch."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.ema_bytes + self.frozen_bytes

    @property
    def memory_bytes(self) -> int:
        """The peak: in the backward pass with all gradients present (as in gradient accumulation), or in the EMA's
        step, which temporarily holds one more copy of the weights.
        """
        return self.lasting_bytes + max(self.activations_bytes, self.ema_bytes)

    @property
    def state_bytes(self) -> int:
        """Size on disk of a saved state."""
        return self.checkpoint_bytes + self.optimizer_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Size on disk of the raw weights and their EMA."""
        return self.weights_bytes + self.ema_bytes


def training_costs(configs: Configs, method: Section, train: TrainParams, latent_shape: tuple[int, int, int]) -> Costs:
    """Estimate what training costs; takes about a second for Stable Diffusion 1.5.

    Activations are those of a GPU: CUDA's autocast, whose 16-bit copies of the weights can make 16 bit need
    more memory at small batches, and fused attention, which keeps no attention matrix (the `math` kernel does).
    Compared with PyTorch's profiler on a CPU: fp32 within 2 %, except for some MiB of buffers inside kernels; bf16
    up to 25 % too high, because the CPU's autocast leaves norms in bf16. No GPU has been measured. Not included are
    the CUDA context, cuDNN's and cuBLAS's workspaces, the allocator's rounding and fragmentation,
    torch.compile, and validation with its images.

    Args:
        method: the section of params.yaml.
        latent_shape: channels, height and width of one latent.
    """
    parts = meta_parts(configs, sample_size=latent_shape[-1])
    with torch.device("meta"):
        built = build_method(method, parts)
    weights, modules = trained_parameters(built), (*parts.modules(), built.trained)
    all_weights = {id(p): p for module in modules for p in module.parameters()}
    num_parameters = sum(p.numel() for p in weights.values())
    return Costs(
        num_parameters=num_parameters,
        weights_bytes=4 * num_parameters,
        gradients_bytes=4 * num_parameters,
        optimizer_bytes=sum(_optimizer_bytes(p.numel(), train.optimizer) for p in weights.values()),
        ema_bytes=4 * num_parameters if train.use_ema else 0,
        frozen_bytes=4 * (sum(p.numel() for p in all_weights.values()) - num_parameters),
        activations_bytes=_activations_bytes(
            built,
            modules,
            _meta_batch(configs, built, train.micro_batch_size, latent_shape),
            Objective(torch.empty(1000, device="meta"), train.prediction_type, train.snr_gamma),
            _AUTOCAST[train.precision],
            train.gradient_checkpointing,
        ),
    )


def estimate_costs(params: Params, base: Path, latent_shape: tuple[int, int, int]) -> Costs:
    """Estimate what training on this base needs.

    Raises:
        InputError: a config of the base isn't there.
    """
    return training_costs(read_configs(base), params.method, params.train, latent_shape)


def check_memory(costs: Costs, device: torch.device) -> None:
    """Check that weights, gradients and optimizer fit into the device's memory; warns if the batch doesn't.

    Raises:
        InputError: names the estimate and the device's memory.
    """
    total = total_memory_bytes(device)
    if costs.lasting_bytes > total:
        raise InputError(
            f"weights, gradients, optimizer and EMA alone need about {costs.lasting_bytes / 2**30:.1f} GiB, the "
            f"{device.type} has {total / 2**30:.1f} GiB; use train.optimizer: adamw_8bit, or train.use_ema: false"
        )
    if costs.memory_bytes > total:
        print(
            f"warning: an estimated {costs.memory_bytes / 2**30:.1f} GiB are needed, the {device.type} has "
            f"{total / 2**30:.1f} GiB; a smaller train.micro_batch_size or train.gradient_checkpointing: true helps"
        )


def total_memory_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def _meta_batch(configs: Configs, method: Method, size: int, latent_shape: tuple[int, int, int]) -> Batch:
    with torch.device("meta"):
        latents, noise, input_noise = (torch.empty(size, *latent_shape) for _ in range(3))
        timesteps = torch.empty(size, dtype=torch.long)
        input_ids = torch.empty(size, configs.text_encoder["max_position_embeddings"], dtype=torch.long)
        columns = {
            name: torch.empty(size, *column.shape, dtype=getattr(torch, column.dtype))
            for name, column in method.columns.items()
        }
    return Batch(latents, noise, input_noise, timesteps, input_ids, list(range(size)), columns)


def _optimizer_bytes(num_elements: int, optimizer: str) -> int:
    """AdamW's two moments of one parameter tensor.

    8-bit AdamW is bitsandbytes' (Dettmers et al. 2022): a byte each and an fp32 maximum per block of 256,
    but fp32 for tensors of fewer than 4,096 elements.
    """
    if optimizer == "adamw" or num_elements < 4096:
        return 2 * 4 * num_elements
    return 2 * num_elements + 2 * 4 * math.ceil(num_elements / 256)


def _activations_bytes(
    method: Method,
    modules: tuple[nn.Module, ...],
    batch: Batch,
    objective: Objective,
    dtype: torch.dtype | None,
    gradient_checkpointing: bool,
) -> int:
    """Peak bytes of a forward and backward pass besides the modules' weights and gradients; all on the meta device."""
    if gradient_checkpointing:  # as Diffusers does it, with each segment recomputed under autocast
        recompute = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), _GpuKernels(dtype)))
        enable_gradient_checkpointing(modules, recompute)
    weights = [p for module in modules for p in (*module.parameters(), *module.buffers())]
    for parameter in weights:
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    gradients = [parameter.grad for parameter in weights if parameter.grad is not None]
    with _LiveBytes([*weights, *gradients]) as memory, torch.device("meta"):
        for loss_pass in method.losses:
            with _GpuKernels(dtype):
                loss = loss_pass(method.trained, batch, objective)["loss"].mean()
            loss.backward()
            del loss
    return memory.peak


class _GpuKernels(TorchFunctionMode):
    """Autocast to `dtype` (None: no autocast) and fused attention, as on a GPU, for the meta device.

    `torch.autocast` doesn't act on meta tensors, and their attention would take the path that keeps the full
    attention matrix. The memory-efficient kernel keeps q, k, v, its output and a logsumexp, as flash attention does.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._dtype = dtype
        self._weight_copies: list[Tensor] = []  # autocast's cache, with the same lifetime

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, compute_log_sumexp=True)[0]
        if not (torch.is_grad_enabled() and AUTOCASTS.get()):  # frozen encoders and decoders compute in fp32
            return func(*args, **(kwargs or {}))
        if self._dtype is not None and func in _IN_LOW_PRECISION:
            args = [self._cast(arg, self._dtype) for arg in args]
        elif self._dtype is not None and func in _IN_FP32:
            args = [self._cast(arg, torch.float32) for arg in args]
        return func(*args, **(kwargs or {}))

    def _cast(self, arg, dtype: torch.dtype):
        if not isinstance(arg, Tensor) or arg.dtype == dtype:
            return arg
        copy = arg.to(dtype)
        if isinstance(arg, nn.Parameter) and arg.requires_grad:  # frozen ones are cast each time
            self._weight_copies.append(copy)
        return copy


class _LiveBytes(TorchDispatchMode):
    """Peak of the bytes alive at the same time in storages that operations create, without those of `lasting`."""

    def __init__(self, lasting: list[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known = {id(tensor.untyped_storage()) for tensor in lasting}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self._known:
                self._known.add(id(storage))
                self._live += storage.nbytes()
                self.peak = max(self.peak, self._live)
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        return out

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._live -= num_bytes

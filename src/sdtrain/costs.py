"""What a training run needs in memory and on disk, known before it starts: nothing is allocated or computed.

Weights and the states of optimizer and EMA are counted. Activations are measured: one micro-batch goes
forward and backward through the UNet on torch's meta device, whose tensors have a shape, a dtype and a
lifetime but no data, while the bytes alive at the same time are added up.
"""

import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# The UNet's part of CUDA autocast's lists (ATen/autocast_mode.h); the CPU's autocast casts none of _IN_FP32.
_IN_LOW_PRECISION = frozenset({F.linear, F.conv2d})
_IN_FP32 = frozenset({F.layer_norm, F.group_norm, F.interpolate})


@dataclass(frozen=True)
class Costs:
    """Bytes of one process; with several, DDP holds the gradients once more, in buckets."""

    num_parameters: int
    """Of the UNet, all of which are trained."""
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    frozen_bytes: int
    """VAE and text encoder."""
    activations_bytes: int
    """The most that forward and backward pass of one micro-batch hold beside all the above."""

    @property
    def lasting_bytes(self) -> int:
        """What is held from the first step to the last, whatever the batch."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.ema_bytes + self.frozen_bytes

    @property
    def memory_bytes(self) -> int:
        """The peak: in the backward pass with all gradients there (as in gradient accumulation), or in the EMA's
        step, which holds one more copy of the weights for a moment.
        """
        return self.lasting_bytes + max(self.activations_bytes, self.ema_bytes)

    @property
    def state_bytes(self) -> int:
        """On disk: what training needs to go on where it stopped."""
        return self.checkpoint_bytes + self.optimizer_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """On disk: the raw weights and their EMA."""
        return self.weights_bytes + self.ema_bytes


def training_costs(
    unet_config: dict,
    latent_shape: tuple[int, int, int],
    *,
    sequence_length: int,
    micro_batch_size: int,
    precision: Literal["fp32", "bf16", "fp16"],
    gradient_checkpointing: bool,
    optimizer: Literal["adamw", "adamw_8bit"],
    use_ema: bool,
    frozen_parameters: int,
) -> Costs:
    """Estimate what training a UNet of this config costs; takes about a second for Stable Diffusion 1.5's.

    Activations are a GPU's: CUDA's autocast, whose 16-bit copies of the weights can make 16 bit the larger
    choice at small batches, and fused attention, which keeps no attention matrix (the `math` kernel does).
    Held against PyTorch's profiler on a CPU: fp32 within 2 %, but for some MiB of buffers inside kernels; bf16
    up to 25 % too high, because the CPU's autocast leaves norms in bf16. No GPU has been measured. Left out are
    the CUDA context, cuDNN's and cuBLAS's workspaces, the allocator's rounding and fragmentation,
    torch.compile, the text encoder's forward pass, and validation with its pictures.

    Args:
        latent_shape: channels, height and width of one latent: (4, 64, 64) for 512 px.
        sequence_length: tokens per caption, padding included: 77 for CLIP.
        frozen_parameters: of VAE and text encoder together, held in fp32; see `count_parameters`.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
    num_parameters = sum(p.numel() for p in unet.parameters())
    return Costs(
        num_parameters=num_parameters,
        weights_bytes=4 * num_parameters,
        gradients_bytes=4 * num_parameters,
        optimizer_bytes=sum(_optimizer_bytes(p.numel(), optimizer) for p in unet.parameters()),
        ema_bytes=4 * num_parameters if use_ema else 0,
        frozen_bytes=4 * frozen_parameters,
        activations_bytes=_activations_bytes(
            unet, (micro_batch_size, *latent_shape), sequence_length, _AUTOCAST[precision], gradient_checkpointing
        ),
    )


def count_parameters(build: Callable[[], nn.Module]) -> int:
    """Parameters of the module that `build` returns, built on the meta device, so without its weights.

    `count_parameters(lambda: AutoencoderKL.from_config(vae_config))` is 83,653,863 for Stable Diffusion 1.5.
    """
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def _optimizer_bytes(num_elements: int, optimizer: str) -> int:
    """AdamW's two moments of one parameter tensor.

    8-bit AdamW is bitsandbytes' (Dettmers et al. 2022): a byte each and an fp32 maximum per block of 256,
    but fp32 for tensors of fewer than 4,096 elements.
    """
    if optimizer == "adamw" or num_elements < 4096:
        return 2 * 4 * num_elements
    return 2 * num_elements + 2 * 4 * math.ceil(num_elements / 256)


def _activations_bytes(
    unet: UNet2DConditionModel,
    batch_shape: tuple[int, ...],
    sequence_length: int,
    dtype: torch.dtype | None,
    gradient_checkpointing: bool,
) -> int:
    """Peak bytes of one forward and backward pass beside weights and gradients; `unet` lies on the meta device."""
    if gradient_checkpointing:  # as Diffusers does it, and each segment is recomputed under autocast
        unet.enable_gradient_checkpointing(
            partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), _GpuKernels(dtype)))
        )
    for parameter in unet.parameters():
        parameter.grad = torch.empty_like(parameter)
    lasting = [tensor for parameter in unet.parameters() for tensor in (parameter, parameter.grad)]
    with _LiveBytes([*lasting, *unet.buffers()]) as memory, torch.device("meta"):
        noisy_latents, target = torch.empty(batch_shape), torch.empty(batch_shape)
        timesteps = torch.empty(batch_shape[0], dtype=torch.long)
        encoder_hidden_states = torch.empty(batch_shape[0], sequence_length, unet.config.cross_attention_dim)
        with _GpuKernels(dtype):
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
        F.mse_loss(model_pred.float(), target).backward()
    return memory.peak


class _GpuKernels(TorchFunctionMode):
    """Autocast to `dtype` (None: no autocast) and fused attention, as on a GPU, for the meta device.

    `torch.autocast` doesn't act on meta tensors, and their attention would take the path that keeps the whole
    attention matrix. The memory-efficient kernel keeps q, k, v, its output and a logsumexp, as flash attention does.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._dtype = dtype
        self._weight_copies: list[Tensor] = []  # autocast's cache, which lives as long as it

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, compute_log_sumexp=True)[0]
        if self._dtype is not None and func in _IN_LOW_PRECISION:
            args = [self._cast(arg, self._dtype) for arg in args]
        elif self._dtype is not None and func in _IN_FP32:
            args = [self._cast(arg, torch.float32) for arg in args]
        return func(*args, **(kwargs or {}))

    def _cast(self, arg, dtype: torch.dtype):
        if not isinstance(arg, Tensor) or arg.dtype == dtype:
            return arg
        copy = arg.to(dtype)
        if isinstance(arg, nn.Parameter):
            self._weight_copies.append(copy)
        return copy


class _LiveBytes(TorchDispatchMode):
    """The peak of the bytes alive together of all storages that operations create; those of `lasting` don't count."""

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

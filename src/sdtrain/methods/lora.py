"""LoRA: a low-rank adapter of the UNet (Hu et al. 2021), by PEFT. The base stays as it is."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdtrain.data.batches import Batch
from sdtrain.data.shards import Column
from sdtrain.ground.errors import InputError
from sdtrain.ground.headers import add_metadata, read_metadata
from sdtrain.ground.layout import ADAPTER_FILE, MERGED
from sdtrain.methods.exports import DTYPES, Exported, export_full, full_model_bytes
from sdtrain.methods.method import denoising_loss, predict_from_text
from sdtrain.models.parts import Parts
from sdtrain.models.pipelines import build_pipeline
from sdtrain.models.trained import load_adapted
from sdtrain.params.schema import ExportParams, LoraParams

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_LINEAR = (*_ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
_CONV = (*_LINEAR, "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
_TARGETS = {"attention": _ATTENTION, "linear": _LINEAR, "conv": _CONV}
_INITS = {"kaiming": True, "gaussian": "gaussian"}
"""PEFT's names. Its others change the base's weights, so their adapters would be of no use on the base."""
_KOHYA_ERROR, _MERGING_ERROR = 1e-6, 1e-5
"""Relative, of predictions in fp32: kohya's alpha is a float32, and rsLoRA's irrational; and sums are rounded."""


class Lora:
    """A `Method`; its saved weights are a file that Diffusers' `load_lora_weights` reads."""

    def __init__(self, params: LoraParams, parts: Parts) -> None:
        self._params, self._parts = params, parts
        self.columns: dict[str, Column] = {}
        self.conditions: tuple[str, ...] = ()
        self.logged: tuple[str, ...] = ()
        self.trained: UNet2DConditionModel = parts.unet
        if not hasattr(parts.unet, "peft_config"):  # else of a pipeline with its exported adapter
            _add_adapter(parts.unet, params)
        (self._adapter,) = parts.unet.peft_config
        self.losses = (denoising_loss(self.predict),)

    def predict(self, model: nn.Module, noisy_latents: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        return predict_from_text(self._parts.text_encoder, model, noisy_latents, timesteps, batch)

    def save(self, folder: Path) -> None:
        self._save(folder, torch.float32)

    def load(self, folder: Path) -> None:
        path = folder / ADAPTER_FILE
        read_metadata(path)  # which checks that the file is whole
        saved = {name.removeprefix("unet."): tensor for name, tensor in load_file(path).items()}
        ours = self._weights()
        differ = [name for name in saved.keys() | ours.keys() if _shape(saved, name) != _shape(ours, name)]
        if differ:
            raise InputError(
                f"{path}: its adapter doesn't match the base and the section method: {len(differ)} tensors differ in "
                f"name or shape, e.g. {min(differ)}"
            )
        set_peft_model_state_dict(self.trained, saved, self._adapter)

    def pipeline(self, scheduler: DDPMScheduler) -> StableDiffusionPipeline:
        return build_pipeline(self._parts, scheduler)

    def export(self, folder: Path, scheduler: DDPMScheduler, params: ExportParams, base: Path) -> Iterator[Exported]:
        dtype = DTYPES[params.dtype]
        if not self._params.use_dora:
            self._save(folder, dtype)
            load = partial(load_adapted, folder, base)
            yield Exported(folder / ADAPTER_FILE, "lora", load)
            file = folder / f"{params.name}.safetensors"
            self._save_kohya(file, dtype)
            yield Exported(file, "lora", partial(load, file.name), error=_KOHYA_ERROR)
        if params.merged:
            single_file = folder / f"{params.name}-merged.safetensors"
            yield from export_full(self._merged(scheduler), folder / MERGED, single_file, params, _MERGING_ERROR)

    def _weights(self) -> dict[str, Tensor]:
        return get_peft_model_state_dict(self.trained, adapter_name=self._adapter)

    def _save(self, folder: Path, dtype: torch.dtype) -> None:
        """In PEFT's keys: of those that Diffusers' own converter makes, it reads only the attention's back."""
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers={name: tensor.to(dtype) for name, tensor in self._weights().items()},
            unet_lora_adapter_metadata={
                "r": self._params.rank,
                "lora_alpha": self._params.alpha,
                "target_modules": list(_targets(self._params)),
                "use_rslora": self._params.use_rslora,
                "use_dora": self._params.use_dora,
            },
        )
        add_metadata(folder / ADAPTER_FILE, {})  # whose order is random otherwise, as are the file's bytes

    def _save_kohya(self, file: Path, dtype: torch.dtype) -> None:
        """In the layout of sd-scripts' networks/lora.py, which A1111 and ComfyUI read.

        With the alpha that gives this adapter's scale; Diffusers' own converter always writes the rank.
        """
        layers = {name: layer for name, layer in self.trained.named_modules() if isinstance(layer, LoraLayer)}
        rank, alpha = self._params.rank, self._params.alpha
        if self._params.use_rslora:
            alpha *= rank**0.5  # so that alpha / rank is the scale
        tensors = {}
        for name, layer in layers.items():
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = layer.lora_A[self._adapter].weight.to(dtype).contiguous()
            tensors[f"{key}.lora_up.weight"] = layer.lora_B[self._adapter].weight.to(dtype).contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        save_file(tensors, file, {"format": "pt"})
        network = {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha), "ss_network_module": "networks.lora"}
        if any(getattr(layer.base_layer, "kernel_size", (1, 1)) != (1, 1) for layer in layers.values()):
            network["ss_network_args"] = json.dumps({"conv_dim": str(rank), "conv_alpha": str(alpha)})
        add_metadata(file, network)

    def _merged(self, scheduler: DDPMScheduler) -> StableDiffusionPipeline:
        """A full model with B·A added to its weights in fp32; a copy, as taking it off again would round them."""
        unet = copy.deepcopy(self.trained)
        unet.fuse_lora()
        unet.unload_lora()
        return build_pipeline(replace(self._parts, unet=unet), scheduler)


def build(params: LoraParams, parts: Parts) -> Lora:
    """An adapter of `parts.unet`: a new one, or the one that it has.

    Raises:
        InputError: the UNet lacks a target module, or PEFT can't adapt it.
    """
    return Lora(params, parts)


def exported_bytes(method: LoraParams, params: ExportParams, num_trained: int, num_all: int) -> int:
    """About the size of what `export` writes; of `num_all` weights in the full model, `num_trained` train."""
    adapter = 0 if method.use_dora else 2 * num_trained * DTYPES[params.dtype].itemsize
    return adapter + (full_model_bytes(method, params, num_trained, num_all) if params.merged else 0)


def _targets(params: LoraParams) -> tuple[str, ...]:
    given = params.target_modules
    return _TARGETS[given] if isinstance(given, str) else tuple(given)


def _add_adapter(unet: UNet2DConditionModel, params: LoraParams) -> None:
    """Add a new adapter, which trains: its weights are float32, and B is zero."""
    _check_targets(unet, params)
    unet.add_adapter(
        LoraConfig(
            r=params.rank,
            lora_alpha=params.alpha,
            target_modules=list(_targets(params)),
            lora_dropout=params.dropout,
            use_rslora=params.use_rslora,
            use_dora=params.use_dora,
            init_lora_weights=_INITS[params.init],
        )
    )


def _check_targets(unet: UNet2DConditionModel, params: LoraParams) -> None:
    """Check that every module that the params name can be adapted; PEFT skips what it doesn't find.

    Of a set by name, e.g. `conv`, one is enough: not every UNet has them all.
    """
    named = dict(unet.named_modules())
    found = {target: [name for name in named if f".{name}".endswith(f".{target}")] for target in _targets(params)}
    missing = [target for target, names in found.items() if not names]
    if isinstance(params.target_modules, str):
        missing = [params.target_modules] if len(missing) == len(found) else []
    if missing:
        raise InputError(
            f"method.target_modules = {params.target_modules!r}: the base's UNet has no module {missing[0]!r}; use "
            f"{', '.join(_TARGETS)}, or the ends of names such as 'attn2.to_k'"
        )
    for target, names in found.items():
        unfit = [name for name in names if not isinstance(named[name], nn.Linear | nn.Conv2d)]
        if unfit:
            raise InputError(
                f"method.target_modules = {params.target_modules!r}: {unfit[0]} is a {type(named[unfit[0]]).__name__}, "
                f"and only Linear and Conv2d layers get an adapter; instead of {target!r} name the layers inside it"
            )


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None

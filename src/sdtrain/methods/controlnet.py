"""ControlNet: a trained copy of the UNet's encoder, which sees a hint (Zhang et al. 2023). The UNet stays as it is."""

import copy
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from diffusers import ControlNetModel, DDPMScheduler, StableDiffusionControlNetPipeline
from torch import Tensor, nn

from sdtrain.data.batches import Batch
from sdtrain.data.shards import Column
from sdtrain.ground.errors import InputError
from sdtrain.ground.layout import CONTROLNET, CONTROLNET_FILE
from sdtrain.methods.exports import DTYPES, Exported
from sdtrain.methods.method import denoising_loss, encode_text
from sdtrain.models.parts import Parts, load_controlnet, vae_factor
from sdtrain.models.pipelines import build_controlnet_pipeline
from sdtrain.models.trained import load_controlled
from sdtrain.params.schema import ControlNetParams, ExportParams

_FACTOR = 8
"""By which the ControlNet's own embedding reduces the hint to the size of the latents."""


class ControlNet:
    """A `Method`; its saved weights are a ControlNetModel's folder."""

    def __init__(self, parts: Parts) -> None:
        factor, size = vae_factor(parts.vae.config.block_out_channels), parts.unet.config.sample_size
        if factor != _FACTOR:
            raise InputError(
                f"method.name = 'controlnet': a hint is reduced to the latents' size by {_FACTOR}, and the base's VAE "
                f"reduces images by {factor}; use another base"
            )
        self._parts = parts
        self.columns = {"hint": Column((3, size * factor, size * factor), dtype="uint8")}
        self.conditions: tuple[str, ...] = ("hint",)
        self.logged: tuple[str, ...] = ()
        if CONTROLNET not in parts.others:  # neither the base's own nor that of an exported pipeline
            parts.others[CONTROLNET] = ControlNetModel.from_unet(parts.unet)
        self.trained: ControlNetModel = parts.others[CONTROLNET].requires_grad_(True)
        self.losses = (denoising_loss(self.predict),)

    def predict(self, model: nn.Module, noisy_latents: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        text, hint = encode_text(self._parts.text_encoder, batch), batch.columns["hint"] / 255
        down, mid = model(noisy_latents, timesteps, text, controlnet_cond=hint, return_dict=False)
        return self._parts.unet(
            noisy_latents,
            timesteps,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample

    def save(self, folder: Path) -> None:
        self.trained.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        try:
            self.trained.load_state_dict(load_controlnet(folder).state_dict())
        except RuntimeError as error:
            raise InputError(f"{folder}: its ControlNet doesn't match the base's structure: {error}") from None

    def pipeline(self, scheduler: DDPMScheduler) -> StableDiffusionControlNetPipeline:
        return build_controlnet_pipeline(self._parts, self.trained, scheduler)

    def export(self, folder: Path, scheduler: DDPMScheduler, params: ExportParams, base: Path) -> Iterator[Exported]:
        """The folder of a ControlNetModel, and the same tensors as one file, which ComfyUI and A1111 recognise."""
        model, file = copy.deepcopy(self.trained), folder / f"{params.name}.safetensors"
        (model.half() if params.dtype == "fp16" else model).save_pretrained(folder)
        yield Exported(folder, "controlnet", partial(load_controlled, folder, base))
        shutil.copyfile(folder / CONTROLNET_FILE, file)
        yield Exported(file, "controlnet", partial(load_controlled, folder, base, file.name))


def build(params: ControlNetParams, parts: Parts) -> ControlNet:
    """A ControlNet of `parts.unet`: a new one, or the one that the parts have.

    Raises:
        InputError: the base's VAE reduces images by another factor than the hint's embedding.
    """
    return ControlNet(parts)


def first_parts(params: ControlNetParams) -> tuple[str, ...]:
    """Further parts of the base that training starts from."""
    return (CONTROLNET,) if params.start == "base" else ()


def exported_bytes(method: ControlNetParams, params: ExportParams, num_trained: int, num_all: int) -> int:
    """About the size of what `export` writes."""
    return 2 * num_trained * DTYPES[params.dtype].itemsize

"""Plain fine-tuning: all of the UNet's weights, on captions."""

from collections.abc import Iterator
from pathlib import Path

from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from sdtrain.data.batches import Batch
from sdtrain.data.shards import Column
from sdtrain.ground.errors import InputError
from sdtrain.methods.exports import Exported, export_full
from sdtrain.methods.method import denoising_loss, predict_from_text
from sdtrain.models.parts import Parts, load_unet
from sdtrain.models.pipelines import build_pipeline
from sdtrain.params.schema import ExportParams, FinetuneParams


class Finetune:
    """A `Method`; its saved weights are a UNet's folder."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.columns: dict[str, Column] = {}
        self.conditions: tuple[str, ...] = ()
        self.logged: tuple[str, ...] = ()
        self.trained = parts.unet.requires_grad_(True)
        self.losses = (denoising_loss(self.predict),)

    def predict(self, model: nn.Module, noisy_latents: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        return predict_from_text(self._parts.text_encoder, model, noisy_latents, timesteps, batch)

    def save(self, folder: Path) -> None:
        self.trained.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        try:
            self.trained.load_state_dict(load_unet(folder).state_dict())
        except RuntimeError as error:
            raise InputError(f"{folder}: its UNet doesn't match the base's structure: {error}") from None

    def pipeline(self, scheduler: DDPMScheduler) -> StableDiffusionPipeline:
        return build_pipeline(self._parts, scheduler)

    def export(self, folder: Path, scheduler: DDPMScheduler, params: ExportParams, base: Path) -> Iterator[Exported]:
        return export_full(self.pipeline(scheduler), folder, folder / f"{params.name}.safetensors", params)


def build(params: FinetuneParams, parts: Parts) -> Finetune:
    """Plain fine-tuning of `parts.unet`."""
    return Finetune(parts)

"""A second training method, outside the package: trains the UNet's time embedding alone, told how bright the image is.

It shows what a method may ask for: a part of the weights, a further column of the cache, two loss passes, two curves.
"""

from pathlib import Path
from typing import Literal

from safetensors.torch import load_file, save_file

from sdtrain.data.shards import Column
from sdtrain.methods import METHODS, Kind
from sdtrain.methods.exports import export_full
from sdtrain.methods.method import denoising_loss, encode_text
from sdtrain.models.pipelines import build_pipeline
from sdtrain.params.schema import Section


class TimeEmbeddingParams(Section):
    name: Literal["time_embedding"]
    weight: float
    """Of the consistency loss."""


class TimeEmbedding:
    def __init__(self, params: TimeEmbeddingParams, parts) -> None:
        self._params, self._parts, self.trained = params, parts, parts.unet
        parts.unet.time_embedding.requires_grad_(True)
        self.columns = {"brightness": Column((1,))}
        self.conditions = ("brightness",)
        self.losses = (self.denoising, self.consistency)
        self.logged = ("denoising", "consistency")

    def predict(self, model, noisy_latents, timesteps, batch, brightness=1.0):
        text = encode_text(self._parts.text_encoder, batch)
        return model(noisy_latents, timesteps, text + brightness * batch.columns["brightness"][:, None]).sample

    def denoising(self, model, batch, objective):
        loss = denoising_loss(self.predict)(model, batch, objective)["loss"]
        return {"loss": loss, "denoising": loss}

    def consistency(self, model, batch, objective):
        """The image's brightness should change little; two calls of the model in one pass."""
        told, untold = (self.predict(model, batch.latents, batch.timesteps, batch, by) for by in (1.0, 0.0))
        loss = (told - untold).float().square().mean(dim=(1, 2, 3))
        return {"loss": self._params.weight * loss, "consistency": loss}

    def save(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.trained.time_embedding.state_dict(), folder / "time_embedding.safetensors")

    def load(self, folder: Path) -> None:
        self.trained.time_embedding.load_state_dict(load_file(folder / "time_embedding.safetensors"))

    def pipeline(self, scheduler):
        return build_pipeline(self._parts, scheduler)

    def export(self, folder, scheduler, params, base):
        return export_full(self.pipeline(scheduler), folder, folder / f"{params.name}.safetensors", params)


METHODS["time_embedding"] = Kind(TimeEmbeddingParams, TimeEmbedding)

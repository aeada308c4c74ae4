"""IC-Light: a UNet that sees the object beside the noise and draws it under another light (Zhang et al. 2025).

The consistency loss asks that light adds up: with the light L split at random into L1 + L2, what the model predicts
under L1 and under L2 must combine to what it predicts under L.
"""

import inspect
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from sdtrain.data.batches import Batch
from sdtrain.data.shards import Column
from sdtrain.ground import randomness
from sdtrain.ground.diffusion import (
    Objective,
    add_lights,
    add_noise,
    signal_to_noise_ratio,
    to_epsilon,
    to_latents,
)
from sdtrain.ground.errors import InputError
from sdtrain.ground.layout import LIGHT_ENCODER, PIPELINE_FILE, UNET_OFFSET
from sdtrain.methods.exports import DTYPES, Exported, in_half
from sdtrain.methods.method import denoising_error, denoising_loss, encode_text, in_fp32
from sdtrain.models.ic_light import IcLightPipeline, LightEncoder, add_light_tokens, widen_conv_in
from sdtrain.models.offsets import merge_offsets, offsets, save_offsets, save_original_offsets
from sdtrain.models.parts import Parts, load_unet, vae_factor
from sdtrain.models.pipelines import build_ic_light_pipeline
from sdtrain.models.trained import load_relit
from sdtrain.params.schema import ExportParams, IcLightParams

_IN_CHANNELS = {"fc": 8, "fbc": 12}
_MERGING_ERROR = 1e-5
"""Relative, of predictions in fp32: the exported UNet is the base plus the offset, which rounds."""


class Phi(ModelMixin, ConfigMixin):
    """φ of the consistency loss: the noise under L1 + L2 from that under L1 and that under L2, per latent pixel.

    Symmetric in 1 and 2, as it sees their sum and the size of their difference; at the start it is their mean.
    """

    @register_to_config
    def __init__(self, channels: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3 * channels + 1, hidden, 1), nn.SiLU(),
            nn.Conv2d(hidden, hidden, 1), nn.SiLU(),
            nn.Conv2d(hidden, channels, 1),
        )  # fmt: skip
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, epsilon_1: Tensor, epsilon_2: Tensor, noisy_latents: Tensor, log_snr: Tensor) -> Tensor:
        """float32 [B, C, h, w], of three such and log SNR [B]."""
        sum, difference = epsilon_1 + epsilon_2, (epsilon_1 - epsilon_2).abs()
        level = (log_snr / 4).view(-1, 1, 1, 1).expand_as(sum[:, :1])  # of about unit size
        return sum / 2 + self.layers(torch.cat([sum, difference, noisy_latents, level], dim=1))


class Relighter(nn.Module):
    """All that trains."""

    def __init__(self, unet: UNet2DConditionModel, light_encoder: LightEncoder | None, phi: Phi | None) -> None:
        super().__init__()
        self.unet, self.light_encoder, self.phi = unet, light_encoder, phi

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        seen: Tensor,
        light: Tensor | None,
        then: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The UNet's prediction [B, C, h, w].

        Args:
            text: the captions' hidden states, [B, L, D].
            seen: latents of foreground and background, [B, C or 2C, h, w].
            light: maps, [B, H, W, 3].
            then: also return this function of the prediction: several processes wrap this module in DDP, which has to
                see all that trains used within one forward pass.
        """
        if self.light_encoder is not None:
            text = torch.cat([text, self.light_encoder(light).to(text.dtype)], dim=1)
        model_pred = self.unet(torch.cat([noisy_latents, seen], dim=1), timesteps, text).sample
        return model_pred if then is None else (model_pred, then(model_pred))


class IcLight:
    """A `Method`; its saved weights are folders of a UNet and, if they train, the light encoder and φ."""

    def __init__(self, params: IcLightParams, parts: Parts) -> None:
        self._params, self._parts = params, parts
        channels, size = parts.vae.config.latent_channels, parts.unet.config.sample_size
        latents = Column((channels, size, size), flips=True)
        self.columns = {name: latents for name in self._seen_names}
        if params.light == "map":
            self.columns["light"] = Column((*params.light_size, 3))
        self.conditions: tuple[str, ...] = tuple(self.columns)
        parts.unet = _widened(params, parts)
        if params.light == "map":
            if LIGHT_ENCODER not in parts.others:  # else of an exported pipeline
                dim = parts.unet.config.cross_attention_dim
                parts.others[LIGHT_ENCODER] = LightEncoder(tuple(params.light_size), params.num_light_tokens, dim)
            add_light_tokens(parts.unet, params.num_light_tokens)
        phi = Phi(channels) if params.phi == "mlp" else None
        self.trained = Relighter(parts.unet, parts.others.get(LIGHT_ENCODER), phi).requires_grad_(True)
        self.logged: tuple[str, ...] = ()
        self.losses = (denoising_loss(self.predict),)
        if params.consistency_weight:
            self.columns["mask"] = Column((1, size, size))
            if params.consistency_latents == "own":
                self.columns |= {"light_1": self.columns["light"], "relit_1": latents, "relit_2": latents}
            self.logged = ("loss_denoising", "loss_consistency", "light_difference")
            self.losses = (self._loss_under_three_lights,)

    def predict(self, model: nn.Module, noisy_latents: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        text = encode_text(self._parts.text_encoder, batch)
        return model(noisy_latents, timesteps, text, self._seen(batch), batch.columns.get("light"))

    def save(self, folder: Path) -> None:
        for name, module in self.trained.named_children():
            module.save_pretrained(folder / name)

    def load(self, folder: Path) -> None:
        """As every method; of a run without φ, which is the loss's and not the model's, φ stays as it is."""
        for name, module in self.trained.named_children():
            if name == "phi" and not (folder / name).exists():
                continue
            loaded = load_unet(folder / name) if name == "unet" else _load(type(module), folder / name)
            try:
                module.load_state_dict(loaded.state_dict())
            except RuntimeError as error:
                raise InputError(f"{folder / name}: doesn't match the base and the section method: {error}") from None

    def pipeline(self, scheduler: DDPMScheduler) -> IcLightPipeline:
        return build_ic_light_pipeline(self._parts, scheduler)

    def export(self, folder: Path, scheduler: DDPMScheduler, params: ExportParams, base: Path) -> Iterator[Exported]:
        """The folder of an IcLightPipeline with its code, and the UNet's offset from the base in both programs' keys.

        The exported UNet is the base plus the offset, so that programs that add it have the same weights to the bit.
        """
        unet, dtype = load_unet(base / "unet"), DTYPES[params.dtype]
        offset = offsets(self._parts.unet, unet, dtype)
        merge_offsets(unet, offset)
        if self._params.light == "map":
            add_light_tokens(unet, self._params.num_light_tokens)
        pipeline = build_ic_light_pipeline(replace(self._parts, unet=unet), scheduler)
        pipeline = in_half(pipeline) if params.dtype == "fp16" else pipeline
        pipeline.save_pretrained(folder, safe_serialization=True)
        shutil.copyfile(inspect.getfile(IcLightPipeline), folder / PIPELINE_FILE)
        yield Exported(folder, "", partial(load_relit, folder, base), _MERGING_ERROR, pipeline)
        kind = f"ic-light-{self._params.variant}"
        file, original = (folder / f"{params.name}{end}.safetensors" for end in ("", "-original"))
        save_offsets(file, offset, dtype)
        yield Exported(file, kind, partial(load_relit, folder, base, file.name), _MERGING_ERROR)
        save_original_offsets(original, offset, unet.config, dtype)
        load = partial(load_relit, folder, base, original.name)
        yield Exported(original, kind, load, _MERGING_ERROR, is_original=True)

    @property
    def _seen_names(self) -> tuple[str, ...]:
        return ("foreground", "background")[: 1 + (self._params.variant == "fbc")]

    def _seen(self, batch: Batch) -> Tensor:
        """Scaled latents beside the noisy ones, [B, C or 2C, h, w]."""
        latents = torch.cat([batch.columns[name] for name in self._seen_names], dim=1)
        return latents * self._parts.vae.config.scaling_factor

    def _loss_under_three_lights(self, model: nn.Module, batch: Batch, objective: Objective) -> dict[str, Tensor]:
        """Denoising under the row's light L, and consistency of the predictions under L, L1 and L2 = L - L1.

        One forward pass of 3B rows. An error of ε is weighted by σ² = 1 - ᾱ_t, and one of decoded images, which is ε's
        times σ²/ᾱ_t, by ᾱ_t: at low noise z_t itself shows the image under L, so what the model says there of other
        lights means little, and the closed form divides by σ.
        """
        alphas_cumprod = objective.alphas_cumprod
        light, timesteps = batch.columns["light"], batch.timesteps
        if self._params.consistency_latents == "own":
            light_1, factor = batch.columns["light_1"], self._parts.vae.config.scaling_factor
            clean = [batch.latents, *(batch.columns[name] * factor for name in ("relit_1", "relit_2"))]
        else:
            light_1, clean = light * _light_masks(batch), [batch.latents] * 3
        all_timesteps = timesteps.repeat(3)
        noisy_latents = add_noise(torch.cat(clean), batch.input_noise.repeat(3, 1, 1, 1), all_timesteps, alphas_cumprod)
        text = encode_text(self._parts.text_encoder, batch).repeat(3, 1, 1)

        def errors(model_pred: Tensor) -> tuple[Tensor, Tensor]:
            return self._consistency_errors(model_pred.float(), noisy_latents, batch, objective)

        model_pred, (consistency, difference) = model(
            noisy_latents,
            all_timesteps,
            text,
            self._seen(batch).repeat(3, 1, 1, 1),
            torch.cat([light, light_1, (light - light_1).clamp(min=0)]),  # files of maps round
            then=errors,
        )
        denoising = denoising_error(model_pred[: len(timesteps)], batch, objective)
        return {
            "loss": denoising + self._params.consistency_weight * consistency,
            "loss_denoising": denoising,
            "loss_consistency": consistency,
            "light_difference": difference,
        }

    def _consistency_errors(
        self, model_pred: Tensor, noisy_latents: Tensor, batch: Batch, objective: Objective
    ) -> tuple[Tensor, Tensor]:
        """The consistency loss, and ‖ε₁ - ε₂‖², which gives away a model that ignores light, [B].

        Its loss with a learned φ is 0, since φ(ε, ε) = ε is easily learned.
        """
        alphas_cumprod, prediction_type = objective.alphas_cumprod, objective.prediction_type
        timesteps, mask = batch.timesteps, batch.columns["mask"]
        sigma_squared = 1 - alphas_cumprod[timesteps]
        schedule = (timesteps.repeat(3), alphas_cumprod, prediction_type)
        epsilon, epsilon_1, epsilon_2 = to_epsilon(model_pred, noisy_latents, *schedule).chunk(3)
        whole = noisy_latents[: len(timesteps)]
        difference = (epsilon_1 - epsilon_2).square().mean(dim=(1, 2, 3))
        if self._params.phi == "pixel":
            images = self._linear_images(to_latents(model_pred, noisy_latents, *schedule))
            lit, lit_1, lit_2 = images.chunk(3)
            error = F.interpolate(mask, size=lit.shape[-2:]) * (lit - lit_1 - lit_2)
            return alphas_cumprod[timesteps] * error.square().mean(dim=(1, 2, 3)), difference
        if self._params.phi == "fixed":
            combined = add_lights(epsilon_1, epsilon_2, whole, timesteps, alphas_cumprod, self._black)
        elif self._params.consistency_latents == "own":
            combined = self.trained.phi(epsilon_1, epsilon_2, torch.zeros_like(whole), torch.zeros_like(sigma_squared))
        else:
            log_snr = signal_to_noise_ratio(alphas_cumprod[timesteps]).clamp(min=1e-8).log()
            combined = self.trained.phi(epsilon_1, epsilon_2, whole, log_snr)
        error = mask * (epsilon - combined)
        return sigma_squared * error.square().mean(dim=(1, 2, 3)), difference

    def _linear_images(self, latents: Tensor) -> Tensor:
        """Decoded, in linear light (IEC 61966-2-1), [B, 3, H, W]; 1 is white."""
        with in_fp32(latents.device.type):
            pixels = self._parts.vae.decode(latents / self._parts.vae.config.scaling_factor).sample
        srgb = ((pixels + 1) / 2).clamp(min=0)
        return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)

    @cached_property
    def _black(self) -> Tensor:
        """The scaled latents of an image without light, [1, C, h, w]; in pixels they would be -1."""
        vae = self._parts.vae
        side = self._parts.unet.config.sample_size * vae_factor(vae.config.block_out_channels)
        black = torch.full((1, 3, side, side), -1.0, device=vae.device)
        with torch.no_grad(), in_fp32(vae.device.type):
            return vae.encode(black).latent_dist.mode() * vae.config.scaling_factor


def _light_masks(batch: Batch) -> Tensor:
    """Which of a map's lights belong to L1, drawn for each row: 0 or 1, [B, H, W, 1]."""
    light = batch.columns["light"]
    masks = [randomness.generator(seed, "light split").random(light.shape[1:3]) < 0.5 for seed in batch.seeds]
    return torch.from_numpy(np.stack(masks)).to(light.device, light.dtype)[..., None]


def _widened(params: IcLightParams, parts: Parts) -> UNet2DConditionModel:
    """The UNet with inputs for the conditions: new ones, those of the base's offset, or its own if it was exported."""
    wanted, found = _IN_CHANNELS[params.variant], parts.unet.config.in_channels
    if UNET_OFFSET in parts.others:
        offset = parts.others.pop(UNET_OFFSET)
        found = offset.config.in_channels
        merge_offsets(parts.unet, offset.state_dict())
    if found not in (parts.vae.config.latent_channels, wanted):
        raise InputError(
            f"method.variant = {params.variant!r}: its UNet has {wanted} input channels, that of base.unet_offset has "
            f"{found}; use method.variant: {'fc' if found == 8 else 'fbc'}, or another file"
        )
    widen_conv_in(parts.unet, wanted)
    return parts.unet


def _load(kind: type[ModelMixin], folder: Path) -> ModelMixin:
    try:
        return kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: its {kind.__name__} can't be loaded: {error}") from None


def build(params: IcLightParams, parts: Parts) -> IcLight:
    """Relighting with `parts.unet`, which gets a wider first convolution.

    Raises:
        InputError: the base's offset is of the other variant.
    """
    return IcLight(params, parts)


def found_parts(params: IcLightParams) -> tuple[str, ...]:
    """Further parts of the base that training starts from if they are there."""
    return (UNET_OFFSET,)


def exported_bytes(method: IcLightParams, params: ExportParams, num_trained: int, num_all: int) -> int:
    """About the size of what `export` writes: the full model, and the UNet's offset twice."""
    return (num_all + 2 * num_trained) * DTYPES[params.dtype].itemsize

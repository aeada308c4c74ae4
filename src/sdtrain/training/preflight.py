"""Checks before the first step, so that hours aren't spent on a run that can't succeed."""

from pathlib import Path
from typing import get_args

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor

from sdtrain.data.shards import LatentShards, read_probe
from sdtrain.evaluation.held_out import HeldOut
from sdtrain.ground.diffusion import PredictionType
from sdtrain.ground.errors import InputError
from sdtrain.ground.manifests import BaseManifest, LatentsManifest
from sdtrain.training.memory import Costs, check_memory, estimate_costs
from sdtrain.training.spec import RunSpec
from sdtrain.training.trainer import Trainer
from sdtrain.training.validation import condition_gaps, held_out_losses, held_out_shards

_STD_RANGE = (0.4, 2.5)
"""Of scaled latents: about 1 if scaled once; with SD's factor about 5.5 if unscaled, and 0.18 if scaled twice."""
_MIN_PSNR_DB = 12.0
"""Of the VAE's round trip. A good VAE reaches 20 or more; a constant grey image about 10."""
_MAX_CACHE_ERROR = 0.05
"""Relative L2 distance of cached and recomputed means; float16 storage and another device's kernels are far below."""


def check_run(spec: RunSpec, trainer: Trainer) -> Costs:
    """Check cache, VAE and memory before the first step, and say what was found; returns what the run needs.

    Raises:
        InputError: names what is wrong.
    """
    train, files, accelerator = spec.params.train, spec.files, trainer.accelerator
    costs = estimate_costs(spec.params, files.base, spec.cache.shape)
    check_tokens(spec.cache, trainer.parts.text_encoder.config.vocab_size, files.latents)
    check_memory(costs, accelerator.device)
    first = trainer.batches.make(0, range(min(train.batch_size, 64)), accelerator.device)
    std = check_latents(first.latents)
    psnr = check_vae(trainer.parts.vae, held_out_shards(files), files.latents)
    base_type, own_type = trainer.parts.scheduler.config.prediction_type, train.prediction_type
    if base_type != own_type and not any(p.requires_grad for p in trainer.parts.unet.parameters()):
        raise InputError(
            f"train.prediction_type = {own_type!r}: the base predicts {base_type!r}, and with method.name = "
            f"{spec.params.method.name!r} its UNet stays as it is; use {base_type!r}"
        )
    if base_type != own_type:
        accelerator.print(
            f"train.prediction_type = {own_type!r}, the base predicts {base_type!r}: the model has to learn "
            "another prediction type"
        )
    accelerator.print(
        f"run {spec.fingerprint}: latents' std {std:.2f}, VAE round trip {psnr:.1f} dB, "
        f"{costs.num_parameters:,} parameters, about {costs.memory_bytes / 2**30:.1f} GiB of memory"
    )
    return costs


def check_base(spec: RunSpec, trainer: Trainer, held_out: HeldOut) -> tuple[list[float], dict[str, float | None]]:
    """Check the base's held-out loss; returns it at each timestep, and the base's condition-use gaps.

    Raises:
        InputError: as `check_base_loss`.
    """
    losses, base_scheduler = {}, trainer.parts.scheduler
    for prediction_type in get_args(PredictionType):
        scheduler = DDPMScheduler.from_config(base_scheduler.config, prediction_type=prediction_type)
        losses[prediction_type] = held_out_losses(trainer, held_out, scheduler)
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    from_scratch = BaseManifest.read(spec.files.base).is_from_scratch
    check_base_loss(means, base_scheduler.config.prediction_type, from_scratch)
    right = losses[base_scheduler.config.prediction_type]
    return right, condition_gaps(trainer, held_out, base_scheduler, right)


def check_tokens(manifest: LatentsManifest, vocabulary_size: int, latents: Path) -> None:
    """Check that all token ids are in the text encoder's vocabulary.

    Raises:
        InputError: names the largest id and the vocabulary's size.
    """
    if manifest.max_token_id >= vocabulary_size:
        raise InputError(
            f"{latents} has token id {manifest.max_token_id}, but the text encoder knows 0 to {vocabulary_size - 1}: "
            "tokenizer and text encoder don't match; set base.text_encoder_repo, then run `dvc repro`"
        )


def check_latents(batch: Tensor) -> float:
    """Check that scaled latents, [B, C, h, w], have a standard deviation of about 1; returns it.

    Raises:
        InputError: they don't, e.g. because the VAE's scaling factor wasn't applied, or was applied twice.
    """
    std = batch.std().item()
    if not _STD_RANGE[0] < std < _STD_RANGE[1]:
        raise InputError(
            f"the scaled latents' standard deviation is {std:.3f}, expected about 1 (accepted: "
            f"{_STD_RANGE[0]} to {_STD_RANGE[1]}): the VAE's scaling_factor is wrong, or was applied twice or not at "
            "all; check vae/config.json of the base"
        )
    return std


@torch.no_grad()
def check_vae(vae: AutoencoderKL, shards: LatentShards, latents: Path) -> float:
    """Check that the VAE reproduces the cache of the probe images, unscaled, and decodes it back to the images.

    Returns the round trip's PSNR in dB, over pixels in -1..1.

    Raises:
        InputError: the cache is scaled or made by another VAE, or the round trip loses the image.
    """
    pixels = read_probe(latents).to(vae.device)
    cached = torch.stack([shards.read(row, "mean")["mean"] for row in range(len(pixels))]).to(vae.device)
    fresh = vae.encode(pixels).latent_dist.mean
    error = ((cached - fresh).norm() / fresh.norm()).item()
    if not error < _MAX_CACHE_ERROR:
        factor = ((cached * fresh).sum() / fresh.square().sum()).item()
        raise InputError(
            f"{latents}: doesn't match what the VAE of data/base encodes for the probe images (relative error "
            f"{error:.2f}; the cache is {factor:.3f} times that, expected 1: unscaled, without the scaling factor "
            f"{vae.config.scaling_factor}); run `dvc repro --force precompute`"
        )
    psnr = (10 * torch.log10(4 / (vae.decode(cached).sample.clamp(-1, 1) - pixels).square().mean())).item()
    if not psnr > _MIN_PSNR_DB:
        raise InputError(
            f"the VAE's round trip has a PSNR of {psnr:.1f} dB on the probe images, expected at least "
            f"{_MIN_PSNR_DB:.0f}: no UNet can draw what the VAE loses; use another VAE (base.vae_repo) or a larger "
            "precompute.resolution"
        )
    return psnr


def check_base_loss(losses: dict[str, float], prediction_type: str, from_scratch: bool) -> None:
    """Check that the base UNet predicts held-out noise, unless it has never been trained.

    Args:
        losses: held-out loss with the UNet's output read as each prediction type.
        prediction_type: what the base's scheduler says that the UNet predicts.

    Raises:
        InputError: the loss is 1 or more, that of predicting zero; or it is less than half with another
            prediction type than the scheduler's.
    """
    if from_scratch:
        return
    loss, other = losses[prediction_type], min(losses, key=losses.__getitem__)
    if losses[other] < loss / 2:
        raise InputError(
            f"the base's held-out loss is {loss:.3f} as its scheduler_config.json says, with prediction_type "
            f"{prediction_type!r}, but {losses[other]:.3f} with {other!r}; fix prediction_type in that file"
        )
    if not loss < 1:
        raise InputError(
            f"the base's held-out loss is {loss:.3f}, expected below 1 (predicting zero gives 1); "
            "the VAE may not be the UNet's own, or the UNet isn't trained"
        )

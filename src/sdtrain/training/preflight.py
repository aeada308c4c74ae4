"""Checks before the first step, so that hours aren't spent on a run that can't succeed."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdtrain.data.shards import LatentShards, read_probe
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import existing
from sdtrain.ground.manifests import LatentsManifest
from sdtrain.models.parts import read_configs
from sdtrain.params.schema import Params, PrecomputeParams
from sdtrain.training.memory import Costs, training_costs

_STD_RANGE = (0.4, 2.5)
"""Of scaled latents: about 1 if scaled once; with SD's factor about 5.5 if unscaled, and 0.18 if scaled twice."""
_MIN_PSNR_DB = 12.0
"""Of the VAE's round trip. A good VAE reaches 20 or more; a constant grey image about 10."""
_MAX_CACHE_ERROR = 0.05
"""Relative L2 distance of cached and recomputed means; float16 storage and another device's kernels are far below."""

MAX_STATES = 3
"""Saved states of a run on disk at once: two are kept, and the next is written before the older one is deleted."""


def estimate_costs(params: Params, base: Path, latent_shape: tuple[int, int, int]) -> Costs:
    """Estimate what training on this base needs.

    Raises:
        InputError: a config of the base isn't there.
    """
    return training_costs(read_configs(base), params.method, params.train, latent_shape)


def check_cache(manifest: LatentsManifest, precompute: PrecomputeParams, seed: int, latents: Path) -> None:
    """Check that the latent cache was made with these params.

    Raises:
        InputError: names what differs.
    """
    ours = {**precompute.model_dump(exclude={"batch_size"}), "seed": seed}
    theirs = {**manifest.params, "seed": manifest.seed}
    for name, value in ours.items():
        if theirs.get(name) != value:
            key = name if name == "seed" else f"precompute.{name}"
            raise InputError(
                f"{latents} was made with {key} = {theirs.get(name)!r}, params.yaml says {value!r}; "
                "run `dvc repro precompute`"
            )


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


@dataclass(frozen=True)
class DiskNeeds:
    """Peak size of what a run writes."""

    states_bytes: int
    """In the folder of saved states, the best checkpoints so far included."""
    checkpoints_bytes: int
    """In data/checkpoints."""


def disk_needs(costs: Costs, num_best: int) -> DiskNeeds:
    """Disk space of a run of these costs with `num_best` best checkpoints.

    Counted with the states: the best checkpoints, one that only the older state refers to, and one being written.
    There can be more if a run validates more often than it saves.
    """
    states_bytes = MAX_STATES * costs.state_bytes + (num_best + 2) * costs.checkpoint_bytes
    return DiskNeeds(states_bytes, (num_best + 1) * costs.checkpoint_bytes)


def check_disk(costs: Costs, num_best: int, states: Path, out: Path, saved_bytes: int) -> None:
    """Check that saved states and checkpoints will fit on the disk.

    Args:
        saved_bytes: what this run already uses in `states`.

    Raises:
        InputError: names the needed and the free space.
    """
    needed = disk_needs(costs, num_best)
    by_disk: dict[int, int] = {}
    for folder, num_bytes in ((states, needed.states_bytes - saved_bytes), (out, needed.checkpoints_bytes)):
        place = existing(folder)
        device = place.stat().st_dev
        by_disk[device] = by_disk.get(device, 0) + num_bytes
        free = shutil.disk_usage(place).free
        if by_disk[device] > free:
            raise InputError(
                f"{place} has {free / 2**30:.1f} GiB free, saved states and checkpoints need "
                f"{by_disk[device] / 2**30:.1f} GiB; free some space (saved states of other runs are in {states})"
            )


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

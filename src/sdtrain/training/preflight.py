"""What is looked at before the first step, so that hours aren't spent on a run that can't come out right."""

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
"""Of scaled latents. The scaling factor makes it about 1; none at all gives about 5.5 for SD's, twice gives 0.18."""
_MIN_PSNR_DB = 12.0
"""Of the VAE's round trip. A sound VAE reaches 20 and more; a constant grey image about 10."""
_MAX_CACHE_ERROR = 0.05
"""Relative L2 distance of cached and fresh means; float16 storage and another device's kernels stay far below."""

MAX_STATES = 3
"""Saved states of a run on the disk at once: two are kept, and the next one is written before the older goes."""


def estimate_costs(params: Params, base: Path, latent_shape: tuple[int, int, int]) -> Costs:
    """What training on this base needs.

    Raises:
        InputError: a config of the base isn't there.
    """
    return training_costs(read_configs(base), params.method, params.train, latent_shape)


def check_cache(manifest: LatentsManifest, precompute: PrecomputeParams, seed: int, latents: Path) -> None:
    """The latent cache was made with these params.

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
    """No token id lies outside the text encoder's vocabulary.

    Raises:
        InputError: gives the largest id and the vocabulary's size.
    """
    if manifest.max_token_id >= vocabulary_size:
        raise InputError(
            f"{latents} holds token id {manifest.max_token_id}, the text encoder knows 0 to {vocabulary_size - 1}: "
            "tokenizer and text encoder don't belong together; set base.text_encoder_repo, then `dvc repro`"
        )


def check_latents(batch: Tensor) -> float:
    """Latents as the UNet gets them, [B, C, h, w], vary by about 1; their standard deviation.

    Raises:
        InputError: they don't, as where the VAE's scaling factor was left out or applied twice.
    """
    std = batch.std().item()
    if not _STD_RANGE[0] < std < _STD_RANGE[1]:
        raise InputError(
            f"the scaled latents' standard deviation is {std:.3f}, which should be about 1 (accepted: "
            f"{_STD_RANGE[0]} to {_STD_RANGE[1]}): the VAE's scaling_factor is wrong, or was applied twice or not at "
            "all; check vae/config.json of the base"
        )
    return std


@torch.no_grad()
def check_vae(vae: AutoencoderKL, shards: LatentShards, latents: Path) -> float:
    """The VAE encodes the cache's probe images to what is cached, unscaled, and decodes that to the images.

    Returns the round trip's PSNR in dB, over pixels in -1..1.

    Raises:
        InputError: the cache is scaled or of another VAE, or the round trip loses the image.
    """
    pixels = read_probe(latents).to(vae.device)
    cached = torch.stack([shards.read(row, "mean")["mean"] for row in range(len(pixels))]).to(vae.device)
    fresh = vae.encode(pixels).latent_dist.mean
    error = ((cached - fresh).norm() / fresh.norm()).item()
    if not error < _MAX_CACHE_ERROR:
        factor = ((cached * fresh).sum() / fresh.square().sum()).item()
        raise InputError(
            f"{latents}: the VAE of data/base encodes its probe images otherwise than they are cached (relative "
            f"error {error:.2f}; the cache is {factor:.3f} times that, and it must be unscaled, the scaling factor is "
            f"{vae.config.scaling_factor}); run `dvc repro --force precompute`"
        )
    psnr = (10 * torch.log10(4 / (vae.decode(cached).sample.clamp(-1, 1) - pixels).square().mean())).item()
    if not psnr > _MIN_PSNR_DB:
        raise InputError(
            f"the VAE's round trip keeps {psnr:.1f} dB of the probe images, at least {_MIN_PSNR_DB:.0f} are needed: "
            "what it can't draw, no UNet can; take another VAE (base.vae_repo) or a larger precompute.resolution"
        )
    return psnr


def check_base_loss(losses: dict[str, float], prediction_type: str, from_scratch: bool) -> None:
    """The base UNet predicts held-out noise, unless it has never been trained.

    Args:
        losses: held-out loss with the UNet's output read as each prediction type.
        prediction_type: what the base's scheduler says that the UNet predicts.

    Raises:
        InputError: the loss is 1 or more, that of predicting zero; or less than half of it if the output is
            read as something else than the scheduler says.
    """
    if from_scratch:
        return
    loss, other = losses[prediction_type], min(losses, key=losses.__getitem__)
    if losses[other] < loss / 2:
        raise InputError(
            f"the base's held-out loss is {loss:.3f} as its scheduler_config.json says, with prediction_type "
            f"{prediction_type!r}, but {losses[other]:.3f} with {other!r}, which it must predict; mend the file"
        )
    if not loss < 1:
        raise InputError(
            f"the base's held-out loss is {loss:.3f}, a trained UNet's lies below 1 (predicting nothing gives 1); its "
            "VAE may not be the UNet's own, or the UNet isn't trained"
        )


@dataclass(frozen=True)
class DiskNeeds:
    """What a run writes, at the moment when it is most."""

    states_bytes: int
    """In the folder of saved states, the best checkpoints so far included."""
    checkpoints_bytes: int
    """In data/checkpoints."""


def disk_needs(costs: Costs, num_best: int) -> DiskNeeds:
    """What a run of these costs writes that keeps so many best checkpoints.

    Beside the states lie the best checkpoints, one that only the older state still refers to, and one that is being
    written: more where a run validates more often than it saves.
    """
    states_bytes = MAX_STATES * costs.state_bytes + (num_best + 2) * costs.checkpoint_bytes
    return DiskNeeds(states_bytes, (num_best + 1) * costs.checkpoint_bytes)


def check_disk(costs: Costs, num_best: int, states: Path, out: Path, saved_bytes: int) -> None:
    """Check that saved states and checkpoints will fit on the disk.

    Args:
        saved_bytes: what this run takes in `states` already.

    Raises:
        InputError: gives what is needed and what is free.
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
                f"{by_disk[device] / 2**30:.1f} GiB; free some (states of other runs lie in {states})"
            )


def check_memory(costs: Costs, device: torch.device) -> None:
    """Weights, gradients and optimizer fit into the device's memory, whatever the batch.

    Raises:
        InputError: gives the estimate and the memory there is.
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
    """Of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total

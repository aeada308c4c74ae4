"""What one training step sees, as a function of (`train.seed`, step, position in the effective batch)."""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sdtrain.data.shards import Column, LatentShards
from sdtrain.ground import randomness
from sdtrain.params.schema import TrainParams


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows, on one device."""

    latents: Tensor
    """Scaled draws from the VAE's posterior, [B, C, h, w]."""
    noise: Tensor
    """ε of the target, [B, C, h, w]: standard normal, plus the noise offset."""
    input_noise: Tensor
    """ε of the UNet's input, [B, C, h, w]: `noise` plus the input perturbation."""
    timesteps: Tensor
    """int64 [B]."""
    input_ids: Tensor
    """Token ids of the captions, int64 [B, L]; or with `caption_rows` of K distinct ones, [K, L]."""
    seeds: list[int]
    """One for each row: what a method draws of its own follows from it, and so depends on no split of the batch."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """Further columns of the cache that the method needs, by name, [B, ...]."""
    caption_rows: Tensor | None = None
    """Where several rows have one caption: the row of `input_ids` that is each one's, int64 [B]."""


class BatchMaker:
    """Draws micro-batches from the latent cache.

    The training images form one endless stream, a new permutation each epoch; step s takes its
    rows s·B to (s+1)·B-1. A row doesn't depend on how its step is split, nor on earlier draws.

    Args:
        num_train_timesteps: T of the noise schedule.
        scaling_factor: the VAE's; applied here, once.
        null_ids: token ids of the empty caption, int64 [L].
        columns: further columns of the cache that the method needs, by name.

    Raises:
        InputError: the cache has no such column.
    """

    def __init__(
        self,
        shards: LatentShards,
        params: TrainParams,
        *,
        num_train_timesteps: int,
        scaling_factor: float,
        null_ids: Tensor,
        columns: dict[str, Column] | None = None,
    ) -> None:
        shards.check_columns(columns or {})
        self.shards, self.params, self.seed, self.columns = shards, params, params.seed, tuple(columns or ())
        self.num_train_timesteps, self.scaling_factor, self.null_ids = num_train_timesteps, scaling_factor, null_ids

    def make(self, step: int, positions: range, device: torch.device) -> Batch:
        """Rows `positions` of the effective batch of `step`, counted from 0."""
        rows = [self._row(step, position) for position in positions]
        tensors = {name: _to(torch.stack([row[name] for row in rows]), device) for name in rows[0]}
        columns = {name: tensors.pop(name) for name in self.columns}
        seeds = [randomness.integer(self.seed, "method's own", step, position) for position in positions]
        return Batch(**tensors, seeds=seeds, columns=columns)

    def _row(self, step: int, position: int) -> dict[str, Tensor]:
        """One row's fields of `Batch`, and its further columns."""
        place = (self.seed, step, position)
        epoch, index = divmod(step * self.params.batch_size + position, len(self.shards))
        index = int(_epoch_order(self.seed, epoch, len(self.shards))[index])
        flipped = self.shards.has_flipped and _uniform("flip", *place) < 0.5
        cached = self.shards.read(index, "mean", "logvar", "input_ids", *self.columns, flipped=flipped)
        mean, input_ids = cached["mean"], cached["input_ids"]
        spread = (0.5 * cached["logvar"]).exp()
        latents = (mean + spread * _normal("posterior", *place, mean.shape)) * self.scaling_factor
        noise = _normal("noise", *place, mean.shape)
        if self.params.noise_offset:  # https://www.crosslabs.org/blog/diffusion-with-offset-noise
            noise = noise + self.params.noise_offset * _normal("noise offset", *place, (len(mean), 1, 1))
        input_noise = noise
        if self.params.input_perturbation:  # Ning et al. 2023, "Input perturbation reduces exposure bias", alg. 1
            input_noise = noise + self.params.input_perturbation * _normal("perturbation", *place, mean.shape)
        if _uniform("caption dropout", *place) < self.params.caption_dropout:
            input_ids = self.null_ids
        return {
            "latents": latents,
            "noise": noise,
            "input_noise": input_noise,
            "timesteps": torch.tensor(self._timestep(step, position)),
            "input_ids": input_ids,
            **{name: cached[name] for name in self.columns},
        }

    def _timestep(self, step: int, position: int) -> int:
        if self.params.timestep_sampling == "uniform":
            share = _uniform("timestep", self.seed, step, position)
        else:  # one draw shifts a grid of as many points as the batch has rows (Kingma et al. 2021, app. I.1)
            shift = randomness.uniform(self.seed, "timestep strata", step)
            share = (shift + position / self.params.batch_size) % 1.0
        return int(share * self.num_train_timesteps)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":  # a copy from pinned memory doesn't wait for queued GPU work
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _uniform(purpose: str, seed: int, step: int, position: int) -> float:
    return randomness.uniform(seed, purpose, step, position)


def _normal(purpose: str, seed: int, step: int, position: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(randomness.normal(seed, purpose, step, position, shape=tuple(shape)))


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return randomness.generator(seed, "order", epoch).permutation(num_rows)

"""What one training step sees, as a function of (seed, step, position in the effective batch)."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sdtrain import randomness
from sdtrain.shards import LatentShards


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows, on one device."""

    latents: Tensor
    """Scaled draws from the VAE's posterior, [B, C, h, w]."""
    noise: Tensor
    """Standard normal, [B, C, h, w]."""
    timesteps: Tensor
    """int64 [B]."""
    input_ids: Tensor
    """Token ids of the captions, int64 [B, L]."""


class BatchMaker:
    """Draws micro-batches from the latent cache.

    The training pictures form one endless stream, a new permutation each epoch; step s takes its
    rows s·B to (s+1)·B-1. Nothing depends on how a step is split or on what was drawn before it.
    """

    def __init__(
        self,
        shards: LatentShards,
        seed: int,
        batch_size: int,
        num_train_timesteps: int,
        scaling_factor: float,
        caption_dropout: float,
        null_ids: Tensor,
    ) -> None:
        self.shards, self.seed, self.batch_size = shards, seed, batch_size
        self.num_train_timesteps, self.scaling_factor = num_train_timesteps, scaling_factor
        self.caption_dropout, self.null_ids = caption_dropout, null_ids

    def make(self, step: int, positions: range, device: torch.device) -> Batch:
        """Rows `positions` of the effective batch of `step`, counted from 0."""
        rows = [self._row(step, position) for position in positions]
        latents, noise, timesteps, input_ids = (torch.stack(column) for column in zip(*rows, strict=True))
        return Batch(latents.to(device), noise.to(device), timesteps.to(device), input_ids.to(device))

    def _row(self, step: int, position: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        epoch, place = divmod(step * self.batch_size + position, len(self.shards))
        index = int(_epoch_order(self.seed, epoch, len(self.shards))[place])
        flipped = self.shards.has_flipped and randomness.uniform(self.seed, "flip", step, position) < 0.5
        suffix = "_flipped" if flipped else ""
        mean, logvar, input_ids = self.shards.read(index, f"mean{suffix}", f"logvar{suffix}", "input_ids")
        draw = torch.from_numpy(randomness.normal(self.seed, "posterior", step, position, shape=tuple(mean.shape)))
        noise = torch.from_numpy(randomness.normal(self.seed, "noise", step, position, shape=tuple(mean.shape)))
        timestep = int(randomness.uniform(self.seed, "timestep", step, position) * self.num_train_timesteps)
        if randomness.uniform(self.seed, "caption dropout", step, position) < self.caption_dropout:
            input_ids = self.null_ids
        latents = (mean + (0.5 * logvar).exp() * draw) * self.scaling_factor
        return latents, noise, torch.tensor(timestep), input_ids


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return randomness.generator(seed, "order", epoch).permutation(num_rows)

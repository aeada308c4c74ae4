"""The held-out loss: low variance, and the same inputs for every model.

Every held-out image is noised at the middle of equal bins of timesteps, with noise that depends
on (image, bin) alone. So two models, or two steps of one, see identical inputs, and the draw of
timesteps, which causes most of a training loss's noise, doesn't hide their difference. The loss is
the squared error of the implied noise ε, whatever the UNet predicts, so that runs with different
`prediction_type` can be compared. Runs with different noise schedules can't: each uses its own.
"""

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from sdtrain.data.batches import Batch
from sdtrain.data.shards import LatentShards
from sdtrain.ground import randomness
from sdtrain.ground.diffusion import add_noise, mid_bin_timesteps, to_epsilon
from sdtrain.methods.method import Method


class HeldOut:
    """Held-out images, noised the same way at every call of `losses`.

    Args:
        num_train_timesteps: T of the noise schedule.
        num_timesteps: number of bins, and of noised versions of each image.
        max_samples: images used, chosen by a hash of their ids, because the split's order is often by class;
            a larger number keeps a smaller one's images.
        batch_size: noised latents per call of the denoiser.
    """

    def __init__(
        self,
        shards: LatentShards,
        scaling_factor: float,
        *,
        num_train_timesteps: int,
        num_timesteps: int,
        max_samples: int,
        batch_size: int,
    ) -> None:
        ids = shards.ids
        self._rows = sorted(sorted(range(len(ids)), key=lambda row: randomness.hash64(ids[row]))[:max_samples])
        self.ids = [ids[row] for row in self._rows]
        self.num_samples = len(self.ids)
        self.timesteps = mid_bin_timesteps(num_timesteps, num_train_timesteps)
        self._shards, self._scaling_factor, self._batch_size = shards, scaling_factor, batch_size

    @torch.no_grad()
    def losses(self, method: Method, scheduler: SchedulerMixin, part: tuple[int, int] = (0, 1)) -> Tensor:
        """Squared error of ε, float32 [num_samples, num_timesteps] on the method's device. Changes no random state.

        Args:
            scheduler: the noise schedule and prediction type that the weights were trained with.
            part: (k, n) computes every n-th row from the k-th on and leaves the others 0, for n processes to sum.
        """
        model, num_bins = method.trained, len(self.timesteps)
        device = next(model.parameters()).device
        alphas_cumprod, prediction_type = scheduler.alphas_cumprod.to(device), scheduler.config.prediction_type
        was_training = model.training
        model.eval()
        pairs = [(sample, bin) for sample in range(self.num_samples) for bin in range(num_bins)]
        losses = torch.zeros(len(pairs), device=device)
        mine = range(part[0], len(pairs), part[1])
        for start in range(0, len(mine), self._batch_size):
            places = list(mine[start : start + self._batch_size])
            batch = self._batch([pairs[place] for place in places], tuple(method.columns), device)
            noisy_latents = add_noise(batch.latents, batch.noise, batch.timesteps, alphas_cumprod)
            model_pred = method.predict(model, noisy_latents, batch.timesteps, batch).float()
            epsilon = to_epsilon(model_pred, noisy_latents, batch.timesteps, alphas_cumprod, prediction_type)
            losses[places] = (epsilon - batch.noise).square().mean(dim=(1, 2, 3))
        model.train(was_training)
        return losses.view(self.num_samples, num_bins)

    def _batch(self, pairs: list[tuple[int, int]], columns: tuple[str, ...], device: torch.device) -> Batch:
        """The rows of (sample, bin) `pairs`, with the posterior's mean as the latent."""
        rows = [self._shards.read(self._rows[sample], "mean", "input_ids", *columns) for sample, _ in pairs]
        cached = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        latents = cached["mean"] * self._scaling_factor
        noise = torch.stack([self._noise(sample, bin, latents.shape[1:]) for sample, bin in pairs]).to(device)
        timesteps = self.timesteps[[bin for _, bin in pairs]].to(device)
        extra = {name: cached[name] for name in columns}
        seeds = [
            randomness.integer(0, "held-out method's own", randomness.hash64(self.ids[sample]), bin)
            for sample, bin in pairs
        ]
        return Batch(latents, noise, noise, timesteps, cached["input_ids"], seeds, extra)

    def _noise(self, sample: int, bin: int, shape: torch.Size) -> Tensor:
        place = randomness.hash64(self.ids[sample])
        return torch.from_numpy(randomness.normal(0, "held-out noise", place, bin, shape=tuple(shape)))

"""The held-out loss: low variance, and the same question to every model.

Every held-out picture is noised at the middle of equal bins of timesteps, with noise that depends
on (picture, bin) alone. So two models, or two steps of one, see identical inputs, and their
difference isn't buried under the draw of timesteps, which makes up most of a training loss's noise.
The loss is the squared error of the implied noise ε, whatever the UNet predicts, so that runs with
different `prediction_type` compare. Runs on different noise schedules don't: each is asked at its own.
"""

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from sdtrain import randomness
from sdtrain.diffusion import add_noise, mid_bin_timesteps, to_epsilon
from sdtrain.shards import LatentShards


class HeldOut:
    """Held-out pictures, noised the same way at every call of `losses`.

    Args:
        num_train_timesteps: T of the noise schedule.
        num_timesteps: bins, so noised versions of each picture.
        max_samples: pictures used, chosen by a hash of their ids: the split's order, often by class, has no say,
            and a larger number adds pictures to a smaller one's.
        batch_size: noised latents per UNet call.
    """

    def __init__(
        self,
        shards: LatentShards,
        text_encoder: CLIPTextModel,
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
        self._shards, self._batch_size = shards, batch_size
        self._text_encoder, self._scaling_factor = text_encoder, scaling_factor

    @torch.no_grad()
    def losses(self, unet: UNet2DConditionModel, scheduler: SchedulerMixin, part: tuple[int, int] = (0, 1)) -> Tensor:
        """Squared error of ε, float32 [num_samples, num_timesteps] on the UNet's device. Changes no random state.

        Args:
            scheduler: the noise schedule and prediction type that `unet` was trained with.
            part: (k, n) does every n-th row from the k-th on and leaves 0 elsewhere: n processes sum theirs up.
        """
        device, num_bins = unet.device, len(self.timesteps)
        alphas_cumprod, prediction_type = scheduler.alphas_cumprod.to(device), scheduler.config.prediction_type
        was_training = unet.training
        unet.eval()
        pairs = [(sample, bin) for sample in range(self.num_samples) for bin in range(num_bins)]
        losses = torch.zeros(len(pairs), device=device)
        mine = range(part[0], len(pairs), part[1])
        for start in range(0, len(mine), self._batch_size):
            places = list(mine[start : start + self._batch_size])
            rows = [pairs[place] for place in places]
            latents, input_ids = (
                torch.stack(column).to(device)
                for column in zip(
                    *(self._shards.read(self._rows[sample], "mean", "input_ids") for sample, _ in rows), strict=True
                )
            )
            latents *= self._scaling_factor
            noise = torch.stack([self._noise(sample, bin, latents.shape[1:]) for sample, bin in rows]).to(device)
            timesteps = self.timesteps[[bin for _, bin in rows]].to(device)
            noisy_latents = add_noise(latents, noise, timesteps, alphas_cumprod)
            encoder_hidden_states = self._text_encoder(input_ids).last_hidden_state
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample.float()
            epsilon = to_epsilon(model_pred, noisy_latents, timesteps, alphas_cumprod, prediction_type)
            losses[places] = (epsilon - noise).square().mean(dim=(1, 2, 3))
        unet.train(was_training)
        return losses.view(self.num_samples, num_bins)

    def _noise(self, sample: int, bin: int, shape: torch.Size) -> Tensor:
        place = randomness.hash64(self.ids[sample])
        return torch.from_numpy(randomness.normal(0, "held-out noise", place, bin, shape=tuple(shape)))

"""The held-out loss: low variance, and the same question to every model.

Every held-out picture is noised at the middle of equal bins of timesteps, with noise that depends
on (picture, bin) alone. So two models, or two steps of one, see identical inputs, and their
difference isn't buried under the draw of timesteps, which makes up most of a training loss's noise.
The loss is the squared error of the implied noise ε, whatever the UNet predicts, so that runs with
different `prediction_type` compare.
"""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from sdtrain import randomness
from sdtrain.diffusion import PredictionType, add_noise, mid_bin_timesteps, to_epsilon
from sdtrain.shards import LatentShards


class HeldOut:
    """Held-out pictures, noised the same way at every call of `losses`.

    Args:
        num_timesteps: bins, so noised versions of each picture.
        max_samples: pictures used, the first of the split.
        batch_size: noised latents per UNet call.
    """

    def __init__(
        self,
        shards: LatentShards,
        text_encoder: CLIPTextModel,
        alphas_cumprod: Tensor,
        scaling_factor: float,
        *,
        num_timesteps: int,
        max_samples: int,
        batch_size: int,
    ) -> None:
        self.num_samples = min(len(shards), max_samples)
        self.timesteps = mid_bin_timesteps(num_timesteps, len(alphas_cumprod))
        self._shards, self._ids, self._batch_size = shards, shards.ids[: self.num_samples], batch_size
        self._text_encoder, self._alphas_cumprod, self._scaling_factor = text_encoder, alphas_cumprod, scaling_factor

    @torch.no_grad()
    def losses(self, unet: UNet2DConditionModel, prediction_type: PredictionType) -> Tensor:
        """Squared error of ε, float32 [num_samples, num_timesteps] on the CPU. Changes no random state."""
        device, num_bins = self._alphas_cumprod.device, len(self.timesteps)
        was_training = unet.training
        unet.eval()
        losses = []
        pairs = [(sample, bin) for sample in range(self.num_samples) for bin in range(num_bins)]
        for start in range(0, len(pairs), self._batch_size):
            rows = pairs[start : start + self._batch_size]
            latents, input_ids = (
                torch.stack(column).to(device)
                for column in zip(*(self._shards.read(sample, "mean", "input_ids") for sample, _ in rows), strict=True)
            )
            latents *= self._scaling_factor
            noise = torch.stack([self._noise(sample, bin, latents.shape[1:]) for sample, bin in rows]).to(device)
            timesteps = self.timesteps[[bin for _, bin in rows]].to(device)
            noisy_latents = add_noise(latents, noise, timesteps, self._alphas_cumprod)
            encoder_hidden_states = self._text_encoder(input_ids).last_hidden_state
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample.float()
            epsilon = to_epsilon(model_pred, noisy_latents, timesteps, self._alphas_cumprod, prediction_type)
            losses.append((epsilon - noise).square().mean(dim=(1, 2, 3)).cpu())
        unet.train(was_training)
        return torch.cat(losses).view(self.num_samples, num_bins)

    def _noise(self, sample: int, bin: int, shape: torch.Size) -> Tensor:
        place = randomness.hash64(self._ids[sample])
        return torch.from_numpy(randomness.normal(0, "held-out noise", place, bin, shape=tuple(shape)))

"""The held-out loss: low variance, and the same inputs for every model.

Every held-out image is noised at the middle of equal bins of timesteps, with noise that depends
on (image, bin) alone. So two models, or two steps of one, see identical inputs, and the draw of
timesteps, which causes most of a training loss's noise, doesn't hide their difference. The loss is
the squared error of the implied noise ε, whatever the UNet predicts, so that runs with different
`prediction_type` can be compared. Runs with different noise schedules can't: each uses its own.

The same loss with one condition taken from other images tells whether the model uses that condition: if it ignores it,
the loss stays as it is. The rise is the *condition-use gap*.
"""

import hashlib

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor
from transformers import CLIPTokenizer

from sdtrain.data.batches import Batch
from sdtrain.data.shards import LatentShards
from sdtrain.ground import randomness
from sdtrain.ground.diffusion import add_noise, mid_bin_timesteps, to_epsilon
from sdtrain.methods.method import Method

TEXT = "text"
"""The caption as a condition."""


class HeldOut:
    """Held-out images, noised the same way at every call of `losses`; or a split's others, to compare with them.

    Args:
        shards: the split whose images are asked about.
        num_train_timesteps: T of the noise schedule.
        num_timesteps: number of bins, and of noised versions of each image.
        max_samples: images used, as `LatentShards.chosen` picks them.
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
        self._rows = sorted(shards.chosen(max_samples))
        self.ids = [ids[row] for row in self._rows]
        self.num_samples = len(self.ids)
        self.timesteps = mid_bin_timesteps(num_timesteps, num_train_timesteps)
        self.shards, self._scaling_factor, self._batch_size = shards, scaling_factor, batch_size
        self._donors: dict[str, list[int]] = {}

    def captions(self, tokenizer: CLIPTokenizer) -> list[str]:
        """The images' captions as the model sees them: in lower case, and cut off where they are too long."""
        ids = [self.shards.read(row, "input_ids")["input_ids"] for row in self._rows]
        return tokenizer.batch_decode(torch.stack(ids), skip_special_tokens=True)

    @torch.no_grad()
    def losses(
        self,
        method: Method,
        scheduler: SchedulerMixin,
        part: tuple[int, int] = (0, 1),
        swapped: str | None = None,
        null_ids: Tensor | None = None,
    ) -> Tensor:
        """Squared error of ε, float32 [num_samples, num_timesteps] on the method's device. Changes no random state.

        Args:
            scheduler: the noise schedule and prediction type that the weights were trained with.
            part: (k, n) computes every n-th batch from the k-th on and leaves the others 0, for n processes to sum.
            swapped: of `conditions_of(method)`, the one that each image takes from another.
            null_ids: token ids of the empty caption, int64 [L], to take the place of every image's.
        """
        model, num_bins = method.trained, len(self.timesteps)
        device = next(model.parameters()).device
        alphas_cumprod, prediction_type = scheduler.alphas_cumprod.to(device), scheduler.config.prediction_type
        was_training = model.training
        model.eval()
        pairs = [(sample, bin) for sample in range(self.num_samples) for bin in range(num_bins)]
        losses = torch.zeros(len(pairs), device=device)
        for places in self._batches(num_bins, part):
            batch = self._batch([pairs[place] for place in places], tuple(method.columns), swapped, null_ids, device)
            noisy_latents = add_noise(batch.latents, batch.noise, batch.timesteps, alphas_cumprod)
            model_pred = method.predict(model, noisy_latents, batch.timesteps, batch).float()
            epsilon = to_epsilon(model_pred, noisy_latents, batch.timesteps, alphas_cumprod, prediction_type)
            losses[places] = (epsilon - batch.noise).square().mean(dim=(1, 2, 3))
        model.train(was_training)
        return losses.view(self.num_samples, num_bins)

    @torch.no_grad()
    def guidance_magnitudes(
        self, method: Method, scheduler: SchedulerMixin, null_ids: Tensor, part: tuple[int, int] = (0, 1)
    ) -> Tensor:
        """How far each caption moves what the model predicts of pure noise, float32 [num_samples].

        The root mean square of the prediction with the caption minus that without, at the last timestep, for noise that
        depends on the image alone: ‖ε(x_T, c) - ε(x_T, ∅)‖ of Wen et al. 2024, "Detecting, explaining, and mitigating
        memorization in diffusion models", over √d, so that resolutions compare. Of v, where the UNet predicts v.

        Args:
            null_ids: token ids of the empty caption, int64 [L].
            part: as of `losses`.
        """
        model, device = method.trained, next(method.trained.parameters()).device
        was_training, last = model.training, scheduler.config.num_train_timesteps - 1
        model.eval()
        found = torch.zeros(self.num_samples, device=device)
        for samples in self._batches(1, part):
            pairs = [(sample, 0) for sample in samples]
            batches = [self._batch(pairs, tuple(method.columns), None, ids, device) for ids in (None, null_ids)]
            shape = batches[0].latents.shape[1:]
            places = [self._place(sample) for sample, _ in pairs]
            noise = np.stack([randomness.normal(0, "guidance noise", place, shape=tuple(shape)) for place in places])
            noisy_latents, timesteps = torch.from_numpy(noise).to(device), torch.full((len(pairs),), last).to(device)
            captioned, without = (method.predict(model, noisy_latents, timesteps, b).float() for b in batches)
            found[samples] = (captioned - without).square().mean(dim=(1, 2, 3)).sqrt()
        model.train(was_training)
        return found

    def differs(self, condition: str) -> bool:
        """Whether the images differ in a condition, so that it can be swapped."""
        return self._donors_of(condition) != self._rows

    def _batches(self, num_each: int, part: tuple[int, int]) -> list[list[int]]:
        """Every n-th batch from the k-th on of the rows, `num_each` of each sample: whole batches, so that a row's
        neighbours, by which it is rounded, don't depend on n. None has rows of a sample whose others are in another,
        unless one sample fills a batch: so each caption is encoded once.
        """
        whole = max(1, self._batch_size // num_each) * num_each
        groups = _sliced(list(range(self.num_samples * num_each)), whole)
        return [batch for group in groups for batch in _sliced(group, self._batch_size)][part[0] :: part[1]]

    def _batch(
        self,
        pairs: list[tuple[int, int]],
        columns: tuple[str, ...],
        swapped: str | None,
        null_ids: Tensor | None,
        device: torch.device,
    ) -> Batch:
        """The rows of (sample, bin) `pairs`, with the posterior's mean as the latent; each caption once."""
        samples = list(dict.fromkeys(sample for sample, _ in pairs))
        rows = [self._row(sample, columns, swapped) for sample in samples]
        cached = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        of_pair = torch.tensor([samples.index(sample) for sample, _ in pairs], device=device)
        input_ids, caption_rows = cached.pop("input_ids"), of_pair
        if null_ids is not None:
            input_ids, caption_rows = null_ids[None].to(device), torch.zeros_like(of_pair)
        of_pairs = {name: tensor[of_pair] for name, tensor in cached.items()}
        latents = of_pairs.pop("mean") * self._scaling_factor
        noise = torch.stack([self._noise(sample, bin, latents.shape[1:]) for sample, bin in pairs]).to(device)
        timesteps = self.timesteps[[bin for _, bin in pairs]].to(device)
        seeds = [randomness.integer(0, "held-out method's own", self._place(sample), bin) for sample, bin in pairs]
        return Batch(latents, noise, noise, timesteps, input_ids, seeds, of_pairs, caption_rows)

    def _row(self, sample: int, columns: tuple[str, ...], swapped: str | None) -> dict[str, Tensor]:
        row = self.shards.read(self._rows[sample], "mean", "input_ids", *columns)
        if swapped is not None:
            row |= self.shards.read(self._donors_of(swapped)[sample], _column(swapped))
        return row

    def _donors_of(self, condition: str) -> list[int]:
        """For each sample the row of the next one whose condition is another; its own if all are the same."""
        if condition not in self._donors:
            self._donors[condition] = self._find_donors(_column(condition))
        return self._donors[condition]

    def _find_donors(self, column: str) -> list[int]:
        read = (self.shards.read(row, column)[column].numpy() for row in self._rows)
        values = [hashlib.sha256(value.tobytes()).digest() for value in read]
        if len(set(values)) < 2:
            return self._rows
        donors = []
        for sample, value in enumerate(values):
            others = (place % self.num_samples for place in range(sample + 1, sample + self.num_samples))
            donors.append(self._rows[next(place for place in others if values[place] != value)])
        return donors

    def _place(self, sample: int) -> int:
        return randomness.hash64(self.ids[sample])

    def _noise(self, sample: int, bin: int, shape: torch.Size) -> Tensor:
        return torch.from_numpy(randomness.normal(0, "held-out noise", self._place(sample), bin, shape=tuple(shape)))


def conditions_of(method: Method) -> tuple[str, ...]:
    """Everything whose use a model's held-out loss can show: the caption (`text`), and the method's own conditions."""
    return TEXT, *method.conditions


def _sliced(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _column(condition: str) -> str:
    """The column of the cache that holds it."""
    return "input_ids" if condition == TEXT else condition

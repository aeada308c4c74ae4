"""What `evaluate` says of the held-out loss: of all models, without text, weighted, and by condition."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sdtrain.evaluation.condition_use import unused
from sdtrain.evaluation.held_out import HeldOut, conditions_of
from sdtrain.ground import randomness
from sdtrain.ground.diffusion import min_snr_weights
from sdtrain.ground.processes import ALONE, Processes
from sdtrain.ground.statistics import bootstrap_interval
from sdtrain.ground.values import Values
from sdtrain.methods.method import Method
from sdtrain.models.parts import tokenize
from sdtrain.params.schema import EvaluateParams

_MIN_SNR_GAMMA = 5.0
"""Hang et al. 2023."""


@dataclass(frozen=True)
class Denoiser:
    """A model whose loss can be measured."""

    method: Method
    scheduler: DDPMScheduler
    """The noise schedule and prediction type that it was trained with."""
    modules: tuple[nn.Module, ...]
    """All that it consists of."""
    processes: Processes = ALONE
    """Who share the measuring; each gets all values."""

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        for module in self.modules:
            module.to(device)

    def losses(self, images: HeldOut, **question: Any) -> np.ndarray:
        """Its losses of images, float64 [images, timesteps]; `question` is `HeldOut.losses`'s own."""
        return self._shared(partial(images.losses, self.method, self.scheduler, **question))

    def guidance_magnitudes(self, images: HeldOut, null_ids: Tensor) -> np.ndarray:
        """How far the images' captions move what it predicts of noise, float64 [images]."""
        return self._shared(partial(images.guidance_magnitudes, self.method, self.scheduler, null_ids))

    def _shared(self, measure: Callable[..., Tensor]) -> np.ndarray:
        """The sum of the processes' parts: where one has values, the others are 0."""
        num = self.processes.num
        parts = self.processes.map(lambda index: measure(part=(index, num)).double().cpu().numpy(), range(num))
        return np.sum(list(parts), axis=0)


def loss_metrics(
    params: EvaluateParams,
    seed: int,
    models: dict[str, Denoiser],
    checkpoints: Iterable[tuple[list[str], Denoiser]],
    held_out: HeldOut,
    tokenizer: CLIPTokenizer,
    values: Values,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Numbers of the held-out loss, and the losses themselves by model, [images, timesteps].

    - `held_out_loss_<model>` of all models, and `held_out_loss_gain` with a 95 % interval over images: of these two
      checkpoints, it says nothing of the recipes that made them.
    - `held_out_loss_null_text_<model>`: without any caption.
    - `held_out_loss_min_snr_<model>`: weighted over timesteps by min(SNR, 5)/SNR, with weights of mean 1.
    - `<condition>_gap_<model>`: the condition-use gap. A condition that isn't used is also told on stderr.

    The images' own values are added to `values`.

    Args:
        models: `base` and `trained`.
        checkpoints: others, each with its names, of which only the loss itself is measured; taken one by one. Where it
            is the trained model itself nothing is computed again.
    """
    trained, null_ids = models["trained"], tokenize(tokenizer, [""])[0]
    held_out.shards.check_columns(trained.method.columns)
    of_images = held_out.ids, held_out.captions(tokenizer), held_out.timesteps.tolist()
    losses = {name: model.losses(held_out) for name, model in models.items()}
    for names, model in checkpoints:
        losses |= dict.fromkeys(names, losses["trained"] if model is trained else model.losses(held_out))
    for name, found in losses.items():
        values.add("held_out_loss", name, found, *of_images)
    gain = (losses["base"] - losses["trained"]).mean(axis=1)
    low, high = bootstrap_interval(gain, params.num_bootstrap, randomness.generator(seed, "bootstrap"))
    numbers = {f"held_out_loss_{name}": found.mean() for name, found in losses.items()}
    numbers |= {"held_out_loss_gain": gain.mean(), "held_out_loss_gain_ci_low": low, "held_out_loss_gain_ci_high": high}
    for name, model in models.items():
        without = model.losses(held_out, null_ids=null_ids)
        values.add("held_out_loss_null_text", name, without, *of_images)
        numbers[f"held_out_loss_null_text_{name}"] = without.mean()
        weighted = losses[name] * _min_snr(held_out, model.scheduler)
        values.add("held_out_loss_min_snr", name, weighted, *of_images)
        numbers[f"held_out_loss_min_snr_{name}"] = weighted.mean()
    for condition in conditions_of(trained.method):
        gap, base_share = None, None
        if held_out.differs(condition):
            gaps = {name: model.losses(held_out, swapped=condition) - losses[name] for name, model in models.items()}
            gap, base_share = gaps["trained"].mean(), gaps["base"].mean() / losses["base"].mean()
            numbers |= _gap_numbers(params, seed, condition, gaps)
            for name, found in gaps.items():
                values.add(f"{condition}_gap", name, found, *of_images)
        if sentence := unused(condition, gap, losses["trained"].mean(), base_share):
            print(f"WARNING: {sentence}", file=sys.stderr)
    return {name: float(number) for name, number in numbers.items()} | {"num_held_out": held_out.num_samples}, losses


def _min_snr(held_out: HeldOut, scheduler: DDPMScheduler) -> np.ndarray:
    """The timesteps' weights of ε's error, float64 [timesteps], of mean 1."""
    weights = min_snr_weights(held_out.timesteps, scheduler.alphas_cumprod, _MIN_SNR_GAMMA, "epsilon").double().numpy()
    return weights / weights.mean()


def _gap_numbers(params: EvaluateParams, seed: int, condition: str, gaps: dict[str, np.ndarray]) -> dict[str, float]:
    """The condition-use gap of both models, and the trained one's 95 % interval over images."""
    rng = randomness.generator(seed, f"{condition} gap bootstrap")
    low, high = bootstrap_interval(gaps["trained"].mean(axis=1), params.num_bootstrap, rng)
    numbers = {f"{condition}_gap_{name}": values.mean() for name, values in gaps.items()}
    return numbers | {f"{condition}_gap_trained_ci_low": low, f"{condition}_gap_trained_ci_high": high}

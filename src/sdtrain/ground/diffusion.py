"""The mathematics of diffusion, as plain functions of tensors.

With ᾱ_t the cumulative product of 1-β (Ho et al. 2020, "Denoising diffusion probabilistic models"):
`alphas_cumprod` is float [num_train_timesteps], `timesteps` int [B], everything else [B, C, h, w].
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Objective:
    """What a denoiser is trained to predict, on which noise schedule, and with which weight per timestep."""

    alphas_cumprod: Tensor
    """ᾱ, float32 [num_train_timesteps]."""
    prediction_type: PredictionType
    snr_gamma: float | None
    """γ of min-SNR weights; None weighs all timesteps equally."""


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε (Ho et al. 2020, eq. 4)."""
    signal, sigma = _rates(timesteps, alphas_cumprod, latents)
    return signal * latents + sigma * noise


def prediction_target(
    latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: PredictionType
) -> Tensor:
    """What the UNet should predict: ε, or v = √ᾱ_t ε - √(1-ᾱ_t) x₀ (Salimans & Ho 2022, app. D)."""
    if prediction_type == "epsilon":
        return noise
    signal, sigma = _rates(timesteps, alphas_cumprod, latents)
    return signal * noise - sigma * latents


def to_epsilon(
    model_pred: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """The noise that a prediction implies: ε = √ᾱ_t v + √(1-ᾱ_t) x_t (Salimans & Ho 2022, app. D)."""
    if prediction_type == "epsilon":
        return model_pred
    signal, sigma = _rates(timesteps, alphas_cumprod, noisy_latents)
    return signal * model_pred + sigma * noisy_latents


def to_latents(
    model_pred: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """The x₀ that a prediction implies: (x_t - √(1-ᾱ_t) ε) / √ᾱ_t (Ho et al. 2020, eq. 15); √ᾱ_t x_t - √(1-ᾱ_t) v."""
    signal, sigma = _rates(timesteps, alphas_cumprod, noisy_latents)
    if prediction_type == "epsilon":
        return (noisy_latents - sigma * model_pred) / signal
    return signal * noisy_latents - sigma * model_pred


def add_lights(
    epsilon_1: Tensor,
    epsilon_2: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    black: Tensor | float,
) -> Tensor:
    """The noise in x_t as an image under light L₁ + L₂, from the noise in the same x_t as one under L₁, and under L₂.

    Light adds up, so x₀ - x_black does: with x₀ = (x_t - σ ε)/√ᾱ_t of one shared x_t,
    ε₁₂ = ε₁ + ε₂ - (x_t - √ᾱ_t x_black)/σ. IC-Light's derivation (Zhang et al. 2025) lacks the last term. It is exact
    where x₀ is linear in light: in pixels 2I - 1 without a tone curve, where black is -1. Behind a VAE it is an
    approximation.

    Args:
        black: x₀ of an image without any light; of the shape of x₀ or to be broadcast to it.
    """
    signal, sigma = _rates(timesteps, alphas_cumprod, noisy_latents)
    return epsilon_1 + epsilon_2 - (noisy_latents - signal * black) / sigma


def signal_to_noise_ratio(alphas_cumprod: Tensor) -> Tensor:
    """SNR = ᾱ / (1-ᾱ), of the shape of `alphas_cumprod` (Kingma et al. 2021, "Variational diffusion models")."""
    return alphas_cumprod / (1 - alphas_cumprod)


def min_snr_weights(
    timesteps: Tensor, alphas_cumprod: Tensor, snr_gamma: float, prediction_type: PredictionType
) -> Tensor:
    """Min-SNR-γ loss weights, float [B] (Hang et al. 2023, "Efficient diffusion training via min-SNR weighting").

    The paper weights the error of x₀ by min(SNR, γ). The error of ε is SNR times that of x₀, the error
    of v is SNR+1 times it, so their weights are min(SNR, γ)/SNR and min(SNR, γ)/(SNR+1). Where
    SNR is 0 (the end of a zero-terminal-SNR schedule) the weight is 1, as in the authors' code: the
    formula's 0 would leave that timestep untrained.
    """
    snr = signal_to_noise_ratio(alphas_cumprod[timesteps])
    scale = snr if prediction_type == "epsilon" else snr + 1
    return torch.where(snr == 0, 1.0, snr.clamp(max=snr_gamma) / scale)


def mid_bin_timesteps(num_bins: int, num_train_timesteps: int) -> Tensor:
    """The middle of each of `num_bins` equal bins of 0..num_train_timesteps-1, int [num_bins]."""
    edges = torch.arange(num_bins, dtype=torch.float64) + 0.5
    return (edges * num_train_timesteps / num_bins).long()


def _rates(timesteps: Tensor, alphas_cumprod: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ_t and √(1-ᾱ_t), [B, 1, 1, 1]."""
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt().to(like.dtype), (1 - alpha).sqrt().to(like.dtype)

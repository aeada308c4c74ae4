"""The mathematics of diffusion, against Diffusers and against numbers worked out by hand."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.testing import assert_close

from sdtrain.ground.diffusion import (
    add_noise,
    mid_bin_timesteps,
    min_snr_weights,
    prediction_target,
    signal_to_noise_ratio,
    to_epsilon,
)

SCHEDULER = DDPMScheduler(  # Stable Diffusion 1.5's
    num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
)
ALPHAS = SCHEDULER.alphas_cumprod
EVERY_TIMESTEP = torch.arange(1000)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(1000, 4, 2, 3, generator=torch.Generator().manual_seed(seed))


LATENTS, NOISE = draw(0), draw(1)


def test_add_noise_equals_diffusers_at_every_timestep():
    ours = add_noise(LATENTS, NOISE, EVERY_TIMESTEP, ALPHAS)
    assert_close(ours, SCHEDULER.add_noise(LATENTS, NOISE, EVERY_TIMESTEP), rtol=0, atol=1e-6)


def test_velocity_equals_diffusers_at_every_timestep():
    ours = prediction_target(LATENTS, NOISE, EVERY_TIMESTEP, ALPHAS, "v_prediction")
    assert_close(ours, SCHEDULER.get_velocity(LATENTS, NOISE, EVERY_TIMESTEP), rtol=0, atol=1e-6)


def test_epsilon_target_is_the_noise():
    assert torch.equal(prediction_target(LATENTS, NOISE, EVERY_TIMESTEP, ALPHAS, "epsilon"), NOISE)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_to_epsilon_inverts_target(prediction_type):
    noisy = add_noise(LATENTS, NOISE, EVERY_TIMESTEP, ALPHAS)
    pred = prediction_target(LATENTS, NOISE, EVERY_TIMESTEP, ALPHAS, prediction_type)
    assert_close(to_epsilon(pred, noisy, EVERY_TIMESTEP, ALPHAS, prediction_type), NOISE, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("timestep", "alpha"), [(0, 0.99915), (500, 0.27633268), (999, 0.00466010)])
def test_stable_diffusion_schedule(timestep, alpha):
    one, zero, when = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([timestep])
    assert add_noise(one, zero, when, ALPHAS).item() ** 2 == pytest.approx(alpha, rel=2e-6)
    assert add_noise(zero, one, when, ALPHAS).item() ** 2 == pytest.approx(1 - alpha, rel=1e-4)


@pytest.mark.parametrize(("timestep", "sigma"), [(0, 0.029167), (999, 14.614641)])
def test_noise_to_signal_at_both_ends(timestep, sigma):
    one, zero, when = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([timestep])
    ratio = add_noise(zero, one, when, ALPHAS) / add_noise(one, zero, when, ALPHAS)
    assert ratio.item() == pytest.approx(sigma, rel=1e-4)


def test_rates_of_each_row_by_hand():
    alphas = torch.tensor([0.64, 0.36])  # rates 0.8 and 0.6, then 0.6 and 0.8
    latents, noise = torch.full((2, 1, 1, 1), 10.0), torch.full((2, 1, 1, 1), 5.0)
    timesteps = torch.tensor([1, 0])
    assert_close(add_noise(latents, noise, timesteps, alphas).flatten(), torch.tensor([10.0, 11.0]))
    assert_close(
        prediction_target(latents, noise, timesteps, alphas, "v_prediction").flatten(), torch.tensor([-5.0, -2.0])
    )


@pytest.mark.parametrize(
    ("num_bins", "num_timesteps", "middles"),
    [
        (1, 1000, [500]),
        (4, 1000, [125, 375, 625, 875]),
        (8, 1000, [62, 187, 312, 437, 562, 687, 812, 937]),
        (3, 10, [1, 5, 8]),
        (5, 5, [0, 1, 2, 3, 4]),
    ],
)
def test_mid_bin_timesteps(num_bins, num_timesteps, middles):
    assert mid_bin_timesteps(num_bins, num_timesteps).tolist() == middles


ZERO_TERMINAL = DDPMScheduler.from_config(
    SCHEDULER.config, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
)


def test_snr_equals_diffusers_at_every_timestep():
    assert_close(signal_to_noise_ratio(ALPHAS), compute_snr(SCHEDULER, EVERY_TIMESTEP), rtol=2e-5, atol=0)


@pytest.mark.parametrize(("snr", "nearest"), [(5, 146), (1, 354)])
def test_where_stable_diffusions_snr_is(snr, nearest):
    assert abs((signal_to_noise_ratio(ALPHAS) - snr).abs().argmin().item() - nearest) <= 1


def test_errors_of_epsilon_and_velocity_in_terms_of_x0():
    """‖Δε‖² = SNR ‖Δx₀‖² and ‖Δv‖² = (SNR+1) ‖Δx₀‖², where x_t is held."""
    alphas, snr = ALPHAS.double(), signal_to_noise_ratio(ALPHAS.double())
    noisy, guess = NOISE.double(), LATENTS.double()
    other = guess + 0.1
    rates = alphas.view(-1, 1, 1, 1)

    def noise_of(latents):
        return (noisy - rates.sqrt() * latents) / (1 - rates).sqrt()

    for prediction_type, factor in (("epsilon", snr), ("v_prediction", snr + 1)):
        one, two = (prediction_target(x, noise_of(x), EVERY_TIMESTEP, alphas, prediction_type) for x in (guess, other))
        error = (one - two).square().mean(dim=(1, 2, 3))
        assert_close(error / 0.01, factor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("prediction_type", "mean"), [("epsilon", 0.917), ("v_prediction", 0.294)])
def test_min_snr_weights_over_the_schedule(prediction_type, mean):
    weights = min_snr_weights(EVERY_TIMESTEP, ALPHAS, 5.0, prediction_type)
    snr = compute_snr(SCHEDULER, EVERY_TIMESTEP)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    assert_close(weights, torch.minimum(snr, torch.tensor(5.0)) / divisor, rtol=3e-5, atol=0)
    assert weights.mean().item() == pytest.approx(mean, abs=5e-4)


def test_min_snr_weight_of_velocity_vanishes_with_the_signal():
    """About 0.005 at the end; the form min(SNR+1, γ)/(SNR+1) that others shipped gives 1."""
    assert min_snr_weights(torch.tensor([999]), ALPHAS, 5.0, "v_prediction").item() == pytest.approx(0.00466, rel=1e-3)


def test_min_snr_is_finite_where_no_signal_is_left():
    weights = min_snr_weights(EVERY_TIMESTEP, ZERO_TERMINAL.alphas_cumprod, 5.0, "v_prediction")
    assert weights.isfinite().all()
    assert weights[999] == 1.0


def test_zero_terminal_snr_is_the_published_rescaling_at_every_timestep():
    """√ᾱ' = (√ᾱ-√ᾱ_T) √ᾱ₀ / (√ᾱ₀-√ᾱ_T) (Lin et al. 2024, algorithm 1), in float64."""
    root = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0).sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    ours = ZERO_TERMINAL.alphas_cumprod.double()
    assert_close(ours, expected, rtol=0, atol=1e-6)
    assert expected[500].item() == pytest.approx(0.24101878, rel=1e-6)
    assert ours[500].item() == pytest.approx(0.24101878, rel=1e-5)
    assert ours[998].item() == pytest.approx(1.968e-7, rel=0.02)
    assert ours[999].item() == 0


def test_zero_terminal_snr_schedule_equals_diffusers():
    alphas = ZERO_TERMINAL.alphas_cumprod
    noisy = add_noise(LATENTS, NOISE, EVERY_TIMESTEP, alphas)
    assert_close(noisy, ZERO_TERMINAL.add_noise(LATENTS, NOISE, EVERY_TIMESTEP), rtol=0, atol=1e-6)
    velocity = prediction_target(LATENTS, NOISE, EVERY_TIMESTEP, alphas, "v_prediction")
    assert_close(velocity, ZERO_TERMINAL.get_velocity(LATENTS, NOISE, EVERY_TIMESTEP), rtol=0, atol=1e-6)
    assert torch.equal(noisy[999], NOISE[999])
    assert torch.equal(velocity[999], -LATENTS[999])

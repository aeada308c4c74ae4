"""The mathematics of diffusion, against Diffusers and against numbers worked out by hand."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch.testing import assert_close

from sdtrain.diffusion import add_noise, mid_bin_timesteps, target, to_epsilon

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
    ours = target(LATENTS, NOISE, EVERY_TIMESTEP, ALPHAS, "v_prediction")
    assert_close(ours, SCHEDULER.get_velocity(LATENTS, NOISE, EVERY_TIMESTEP), rtol=0, atol=1e-6)


def test_epsilon_target_is_the_noise():
    assert torch.equal(target(LATENTS, NOISE, EVERY_TIMESTEP, ALPHAS, "epsilon"), NOISE)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_to_epsilon_inverts_target(prediction_type):
    noisy = add_noise(LATENTS, NOISE, EVERY_TIMESTEP, ALPHAS)
    pred = target(LATENTS, NOISE, EVERY_TIMESTEP, ALPHAS, prediction_type)
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
    assert_close(target(latents, noise, timesteps, alphas, "v_prediction").flatten(), torch.tensor([-5.0, -2.0]))


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

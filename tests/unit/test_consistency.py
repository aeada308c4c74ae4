"""The consistency loss: an oracle that knows the lit world satisfies it with the correction, and doesn't without."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.data import lit_scenes
from sdtrain.data.batches import Batch
from sdtrain.ground.diffusion import Objective, add_lights, add_noise, prediction_target, to_epsilon, to_latents
from sdtrain.methods import ic_light
from sdtrain.methods.ic_light import IcLight, Phi
from sdtrain.models.parts import load_parts
from sdtrain.params.schema import IcLightParams

PARAMS = {
    "name": "ic_light", "variant": "fc", "light": "map", "light_size": [1, 5], "num_light_tokens": 3,
    "consistency_weight": 1.0, "phi": "fixed", "consistency_latents": "shared",
}  # fmt: skip
TIMESTEPS = [20, 250, 500, 950]


@pytest.fixture(scope="module")
def alphas_cumprod(root) -> torch.Tensor:
    return DDPMScheduler.from_pretrained(root / "data/builtin", subfolder="scheduler").alphas_cumprod.double()


def example(index: int = 3):
    return lit_scenes.draw_lit(0, index)


def linear(lit, light: np.ndarray) -> torch.Tensor:
    """The picture without a tone curve in -1..1, float64 [1, 3, 64, 64]: what the oracle takes for latents."""
    pixels = 2 * lit_scenes.render_linear(lit, light) - 1
    return torch.from_numpy(pixels.transpose(2, 0, 1))[None]


def oracle(noisy: torch.Tensor, latents: torch.Tensor, timestep: int, alphas: torch.Tensor) -> torch.Tensor:
    """The noise in `noisy` of a model that knows which image is in it: (x_t - √ᾱ x₀) / σ."""
    return (noisy - alphas[timestep].sqrt() * latents) / (1 - alphas[timestep]).sqrt()


@pytest.mark.parametrize("timestep", TIMESTEPS)
@pytest.mark.parametrize("part", [(), ("left",), ("left", "top", "front"), lit_scenes.LIGHTS])
def test_a_perfect_model_satisfies_the_corrected_form_only(alphas_cumprod, timestep, part):
    """Also where all of the light is in one part, and the other is black."""
    lit, light = example().lit, lit_scenes.light_map("top left").astype(np.float64)
    light_1 = light * np.array([name in part for name in lit_scenes.LIGHTS])[None, :, None]
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 64, 64)))
    at = torch.tensor([timestep])
    noisy = add_noise(linear(lit, light), noise, at, alphas_cumprod)
    found, found_1, found_2 = (
        oracle(noisy, linear(lit, part), timestep, alphas_cumprod) for part in (light, light_1, light - light_1)
    )
    corrected = add_lights(found_1, found_2, noisy, at, alphas_cumprod, black=-1.0)
    assert (found - corrected).abs().max() < 1e-10
    assert (found - (found_1 + found_2)).square().mean().sqrt() > 0.9  # as the loss is usually quoted
    if part == lit_scenes.LIGHTS:
        assert torch.allclose(found, found_1)


def test_black_may_have_any_latents(alphas_cumprod):
    """As behind a VAE that is affine in light: x₀ = 3 (2I - 1) + 0.7, so that black isn't -1."""
    lit, light = example().lit, lit_scenes.light_map("right").astype(np.float64)
    light_1, at, black = light * 0.3, torch.tensor([600]), 3 * -1 + 0.7
    encoded = [3 * linear(lit, part) + 0.7 for part in (light, light_1, light - light_1)]
    noisy = add_noise(encoded[0], torch.randn(1, 3, 64, 64, dtype=torch.float64), at, alphas_cumprod)
    found, found_1, found_2 = (oracle(noisy, latents, 600, alphas_cumprod) for latents in encoded)
    assert (found - add_lights(found_1, found_2, noisy, at, alphas_cumprod, black)).abs().max() < 1e-10
    assert (found - add_lights(found_1, found_2, noisy, at, alphas_cumprod, -1.0)).abs().max() > 0.01


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_prediction_gives_back_latents_and_noise(alphas_cumprod, prediction_type):
    latents, noise = torch.randn(2, 4, 4, 4, 4, dtype=torch.float64)
    at = torch.tensor([5, 300, 600, 990])
    noisy = add_noise(latents, noise, at, alphas_cumprod)
    target = prediction_target(latents, noise, at, alphas_cumprod, prediction_type)
    assert torch.allclose(to_latents(target, noisy, at, alphas_cumprod, prediction_type), latents, atol=1e-9)
    assert torch.allclose(to_epsilon(target, noisy, at, alphas_cumprod, prediction_type), noise, atol=1e-9)


def method(root, **changes) -> IcLight:
    parts = load_parts(root / "data/builtin")
    parts.set_resolution(64)
    return IcLight(IcLightParams(**{**PARAMS, **changes}), parts)


def batch_of(latents: torch.Tensor, noise: torch.Tensor, timesteps: list[int], light: np.ndarray, **columns) -> Batch:
    num, size = len(latents), latents.shape[-1]
    ours = {
        "light": torch.from_numpy(light).expand(num, -1, -1, -1),
        "mask": torch.ones(num, 1, size, size, dtype=latents.dtype),
        "foreground": torch.zeros(num, 4, size, size, dtype=latents.dtype),
    }
    ids = torch.zeros(num, 77, dtype=torch.int64)
    return Batch(latents, noise, noise, torch.tensor(timesteps), ids, list(range(num)), {**ours, **columns})


class Oracle:
    """Stands for the model in a loss pass: it knows the scene and sees which light it is asked for."""

    def __init__(self, lit, alphas: torch.Tensor, prediction_type: str = "epsilon") -> None:
        self.lit, self.alphas, self.prediction_type = lit, alphas, prediction_type

    def __call__(self, noisy, timesteps, text, seen, light, then):
        rows = [
            oracle(image[None], linear(self.lit, map.numpy()), int(at), self.alphas)
            for image, at, map in zip(noisy, timesteps, light, strict=True)
        ]
        epsilon = torch.cat(rows)
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        if self.prediction_type == "v_prediction":
            epsilon = (epsilon - (1 - alpha).sqrt() * noisy) / alpha.sqrt()  # v = (ε - σ x_t) / √ᾱ
        return epsilon, then(epsilon)


@pytest.fixture
def keeps_float64(monkeypatch):
    """The loss pass computes in float32, whose rounding would hide how exact the closed form is."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_pass_is_zero_for_the_oracle(root, alphas_cumprod, monkeypatch, keeps_float64, prediction_type):
    ours, lit = method(root), example().lit
    ours.__dict__["_black"] = torch.tensor(-1.0, dtype=torch.float64)  # pixels stand for latents
    light = lit_scenes.light_map("bottom right").astype(np.float64)
    latents = linear(lit, light).expand(4, -1, -1, -1)
    noise = torch.randn(latents.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch, objective = batch_of(latents, noise, TIMESTEPS, light), Objective(alphas_cumprod, prediction_type, None)
    model = Oracle(lit, alphas_cumprod, prediction_type)
    values = ours.losses[0](model, batch, objective)
    assert values["loss_denoising"].max() < 1e-10
    assert values["loss_consistency"].max() < 1e-10
    assert values["light_difference"].min() > 1e-5
    monkeypatch.setattr(ic_light, "add_lights", lambda one, two, *rest: one + two)
    usual = ours.losses[0](model, batch, objective)
    sigma_squared = 1 - alphas_cumprod[torch.tensor(TIMESTEPS)]
    assert (usual["loss_consistency"] / sigma_squared > 0.5).all()


def test_what_lies_outside_the_object_does_not_count(root, alphas_cumprod):
    ours = method(root)
    latents, noise = torch.randn(2, 2, 4, 8, 8)
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :, 4:] = 1
    batch = batch_of(latents, noise, [100, 800], lit_scenes.light_map("left"), mask=mask)
    objective = Objective(alphas_cumprod.float(), "epsilon", None)
    epsilon = torch.randn(6, 4, 8, 8)

    def loss(epsilon: torch.Tensor) -> torch.Tensor:
        return ours.losses[0](lambda *_, then: (epsilon, then(epsilon)), batch, objective)["loss_consistency"]

    outside, inside = epsilon.clone(), epsilon.clone()
    outside[..., :4] += 1
    inside[..., 4:] += 1
    assert torch.equal(loss(outside), loss(epsilon))
    assert not torch.allclose(loss(inside), loss(epsilon))


@pytest.mark.parametrize("phi", ["fixed", "mlp", "pixel"])
def test_the_weight_scales_the_consistency_loss_alone(root, alphas_cumprod, phi):
    latents, noise = torch.randn(2, 2, 4, 8, 8)
    batch = batch_of(latents, noise, [100, 800], lit_scenes.light_map("left"))
    objective, epsilon = Objective(alphas_cumprod.float(), "epsilon", None), torch.randn(6, 4, 8, 8)
    values = [
        method(root, phi=phi, consistency_weight=weight).losses[0](
            lambda *_, then: (epsilon, then(epsilon)), batch, objective
        )
        for weight in (0.1, 1.0)
    ]
    for one, weight in zip(values, (0.1, 1.0), strict=True):
        assert torch.allclose(one["loss"], one["loss_denoising"] + weight * one["loss_consistency"])
        assert (one["loss_consistency"] > 0).all()
    assert torch.allclose(values[0]["loss_consistency"], values[1]["loss_consistency"])


def test_a_model_that_ignores_light_is_given_away_by_the_difference(root, alphas_cumprod):
    """Its loss is 0 as well, with φ at its start, the mean; only ‖ε₁ - ε₂‖ tells."""
    ours = method(root, phi="mlp")
    latents, noise = torch.randn(2, 2, 4, 8, 8)
    epsilon = torch.randn(2, 4, 8, 8).repeat(3, 1, 1, 1)
    batch, objective = (
        batch_of(latents, noise, [100, 800], lit_scenes.light_map("left")),
        Objective(alphas_cumprod.float(), "epsilon", None),
    )
    values = ours.losses[0](lambda *_, then: (epsilon, then(epsilon)), batch, objective)
    assert values["loss_consistency"].abs().max() < 1e-12
    assert not values["light_difference"].any()


def test_the_split_is_of_each_rows_own_and_adds_up(root, alphas_cumprod):
    asked = {}

    def model(noisy, timesteps, text, seen, light, then):
        asked["light"], asked["noisy"] = light, noisy
        return noisy, then(noisy)

    latents, noise = torch.randn(2, 16, 4, 8, 8)
    batch = batch_of(latents, noise, [500] * 16, lit_scenes.light_map("top left"))
    method(root).losses[0](model, batch, Objective(alphas_cumprod.float(), "epsilon", None))
    whole, first, second = asked["light"].chunk(3)
    assert torch.equal(first + second, whole)
    assert torch.equal(first * second, torch.zeros_like(whole))
    assert len({tuple(row.flatten().tolist()) for row in first}) > 3
    one, two, three = asked["noisy"].chunk(3)
    assert torch.equal(one, two)  # one shared x_t
    assert torch.equal(one, three)


def test_own_latents_share_the_noise_and_take_the_given_part(root, alphas_cumprod):
    """As the paper's loss is read: ε of three images of their own. φ then sees the two predictions alone."""
    asked, ours = {}, method(root, phi="mlp", consistency_latents="own")
    ours.trained.phi.forward = lambda *inputs: asked.update(phi=inputs) or inputs[0]

    def model(noisy, timesteps, text, seen, light, then):
        asked["light"], asked["noisy"] = light, noisy
        return noisy, then(noisy)

    latents, noise, relit_1, relit_2 = torch.randn(4, 2, 4, 8, 8)
    light = lit_scenes.light_map("top left")
    light_1 = torch.from_numpy(light * np.float32([1, 0, 0, 0, 0])[None, :, None]).expand(2, -1, -1, -1)
    columns = {"light_1": light_1, "relit_1": relit_1, "relit_2": relit_2}
    objective = Objective(alphas_cumprod.float(), "epsilon", None)
    ours.losses[0](model, batch_of(latents, noise, [300, 700], light, **columns), objective)
    assert torch.equal(asked["light"][2:4], light_1)
    factor = ours._parts.vae.config.scaling_factor
    timesteps = torch.tensor([300, 700])
    for place, clean in enumerate((latents, relit_1 * factor, relit_2 * factor)):
        expected = add_noise(clean, noise, timesteps, objective.alphas_cumprod)
        assert torch.equal(asked["noisy"][2 * place : 2 * place + 2], expected)
    assert not asked["phi"][2].any()
    assert not asked["phi"][3].any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_phi_is_symmetric_and_starts_as_the_mean(seed):
    torch.manual_seed(seed)
    one, two, noisy = torch.randn(3, 2, 4, 5, 5)
    phi, log_snr = Phi(4), torch.randn(2)
    assert torch.allclose(phi(one, two, noisy, log_snr), (one + two) / 2)
    torch.nn.init.normal_(phi.layers[-1].weight)
    assert torch.equal(phi(one, two, noisy, log_snr), phi(two, one, noisy, log_snr))
    assert not torch.allclose(phi(one, two, noisy, log_snr), phi(one, two, noisy, log_snr + 1))


def test_black_is_what_the_vae_encodes(root):
    ours = method(root)
    vae = ours._parts.vae
    with torch.no_grad():
        expected = vae.encode(torch.full((1, 3, 64, 64), -1.0)).latent_dist.mean * vae.config.scaling_factor
    assert torch.equal(ours._black, expected)


def test_pixels_are_compared_in_linear_light(root, monkeypatch):
    """8-bit 188 is about half of the light of 255, and 10 is in the curve's linear part."""
    ours = method(root, phi="pixel")
    vae, values = ours._parts.vae, torch.tensor([255.0, 188.0, 10.0, 0.0, -5.0])
    pixels = (values / 127.5 - 1).view(-1, 1, 1, 1)
    given = {}
    monkeypatch.setattr(vae, "decode", lambda latents: given.update(latents=latents) or SimpleNamespace(sample=pixels))
    light = ours._linear_images(torch.full((5, 4, 1, 1), vae.config.scaling_factor)).flatten()
    assert torch.allclose(given["latents"], torch.ones(5, 4, 1, 1))  # unscaled
    assert light.tolist() == pytest.approx([1.0, 0.5029, 10 / 255 / 12.92, 0.0, 0.0], abs=1e-3)

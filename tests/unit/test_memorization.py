"""What tells a model that memorises from one that learns, on values set by hand."""

from dataclasses import dataclass

import numpy as np
import pytest

from sdtrain.evaluation.memorization import memorization_metrics
from sdtrain.ground.values import Values
from sdtrain.models.parts import load_tokenizer
from tests.conftest import ROOT

TIMESTEPS = np.array([250, 750])


@dataclass
class Images:
    """Stands for `HeldOut`: images with known losses and magnitudes of each model."""

    losses: dict[str, list[list[float]]]
    magnitudes: dict[str, list[float]]
    timesteps = TIMESTEPS

    @property
    def ids(self) -> list[str]:
        return [str(number) for number in range(len(self.losses["base"]))]

    def captions(self, tokenizer) -> list[str]:
        return [f"caption {name}" for name in self.ids]


@dataclass
class Model:
    """Stands for `Denoiser`."""

    name: str

    def losses(self, images: Images) -> np.ndarray:
        return np.array(images.losses[self.name])

    def guidance_magnitudes(self, images: Images, null_ids) -> np.ndarray:
        assert null_ids.shape == (77,)
        return np.array(images.magnitudes[self.name])


TOKENIZER = load_tokenizer(ROOT / "data" / "builtin")


def images(base: list[float], trained: list[float], magnitudes: tuple[list[float], list[float]]) -> Images:
    """Images with these mean losses: a tenth more at the first timestep, a tenth less at the second."""
    losses = {name: [[1.1 * x, 0.9 * x] for x in means] for name, means in (("base", base), ("trained", trained))}
    return Images(losses, dict(zip(("base", "trained"), magnitudes, strict=True)))


def numbers_of(seen: Images, held_out: Images, capsys) -> tuple[dict[str, float], str]:
    models = {name: Model(name) for name in ("base", "trained")}
    losses = {name: np.array(found) for name, found in held_out.losses.items()}
    return memorization_metrics(models, held_out, losses, seen, TOKENIZER, Values()), capsys.readouterr().err


HELD_OUT = images([0.4, 0.5, 0.6], [0.2, 0.25, 0.3], ([1.0, 1.2, 0.8], [1.0, 1.2, 0.8]))
"""A trained loss of half the base's."""


def test_a_model_that_memorises_is_told(capsys):
    """Half of the base's loss less 0.2; and magnitudes that are 0.5 larger."""
    seen = images([0.5, 0.7], [0.05, 0.15], ([1.0, 1.4], [1.5, 1.9]))
    numbers, told = numbers_of(seen, HELD_OUT, capsys)
    assert numbers["memorized_gain"] == pytest.approx(0.2)
    assert numbers["memorized_guidance"] == pytest.approx(0.5)
    assert numbers["train_loss_base"] == pytest.approx(0.6)
    assert numbers["train_loss_trained"] == pytest.approx(0.1)
    assert numbers["guidance_magnitude_held_out_trained"] == pytest.approx(1.0)
    assert "WARNING: the model memorises: the loss of its training images is 0.20000" in told
    assert "80 % of the held-out loss" in told


def test_images_that_are_easier_for_the_base_too_are_no_sign_of_it(capsys):
    seen = images([0.2, 0.3], [0.1, 0.15], ([0.5, 0.4], [0.5, 0.4]))
    numbers, told = numbers_of(seen, HELD_OUT, capsys)
    assert numbers["memorized_gain"] == pytest.approx(0, abs=1e-12)
    assert numbers["memorized_guidance"] == pytest.approx(0, abs=1e-12)
    assert numbers["train_loss_trained"] == pytest.approx(0.125)
    assert told == ""


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_fifth_of_the_loss_is_found_among_images_that_differ_as_real_ones_do(share, capsys):
    """Spreads as on the shipped job: 0.1 of the base's losses, of which the trained ones follow one tenth."""
    rng = np.random.default_rng(0)
    drawn = []
    for factor in (1 - share, 1.0):
        base = rng.uniform(0.01, 0.35, 200)
        drawn.append(images(base, factor * (0.02 + 0.1 * base + rng.normal(0, 0.005, 200)), (base, base)))
    numbers, told = numbers_of(*drawn, capsys)
    assert ("memorises" in told) == (share > 0)
    assert numbers["memorized_gain_ci_high"] - numbers["memorized_gain_ci_low"] < 0.1 * 0.04

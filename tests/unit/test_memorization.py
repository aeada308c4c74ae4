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


HELD_OUT = Images({"base": [[0.5, 0.3], [0.6, 0.4], [0.5, 0.5]], "trained": [[0.3, 0.1], [0.3, 0.1], [0.2, 0.2]]},
                  {"base": [1.0, 1.2, 0.8], "trained": [1.0, 1.3, 0.7]})  # fmt: skip


def numbers_of(seen: Images, capsys) -> tuple[dict[str, float], str]:
    models = {name: Model(name) for name in ("base", "trained")}
    tokenizer = load_tokenizer(ROOT / "data" / "builtin")
    losses = {name: np.array(found) for name, found in HELD_OUT.losses.items()}
    return memorization_metrics(models, HELD_OUT, losses, seen, tokenizer, Values()), capsys.readouterr().err


def test_a_model_that_memorises_is_told(capsys):
    """Gains of 0.5 on training images; of 0.2, 0.3 and 0.3 on held-out ones."""
    seen = Images({"base": [[0.5, 0.7]] * 3, "trained": [[0.1, 0.1]] * 3}, {"base": [1.0] * 3, "trained": [2.0] * 3})
    numbers, told = numbers_of(seen, capsys)
    assert numbers["memorized_gain"] == pytest.approx(0.5 - 0.8 / 3)
    assert numbers["memorized_guidance"] == pytest.approx(1.0)
    assert numbers["memorized_gain_ci_low"] < numbers["memorized_gain"] < numbers["memorized_gain_ci_high"]
    half = 4.302653 * np.std([0.2, 0.3, 0.3], ddof=1) / 3**0.5  # t of 2 degrees of freedom
    assert numbers["memorized_gain_ci_high"] - numbers["memorized_gain"] == pytest.approx(half, rel=1e-5)
    assert numbers["train_loss_base"] == pytest.approx(0.6)
    assert numbers["guidance_magnitude_held_out_trained"] == pytest.approx(1.0)
    assert "WARNING: the model memorises" in told
    assert "117 % of the held-out loss" in told


def test_images_that_are_easier_for_the_base_too_are_no_sign_of_it(capsys):
    easier = {name: [[value - 0.05 for value in row] for row in rows] for name, rows in HELD_OUT.losses.items()}
    numbers, told = numbers_of(Images(easier, HELD_OUT.magnitudes), capsys)
    assert numbers["memorized_gain"] == pytest.approx(0, abs=1e-12)
    assert numbers["train_loss_trained"] == pytest.approx(0.15)
    assert told == ""

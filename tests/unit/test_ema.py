"""The averages' decays against their papers, and an average against its definition."""

import pytest
import torch

from sdtrain.models.ema import PowerFunctionEMA, averaged, build_ema, power_exponent
from sdtrain.params.load import check_params
from tests.conftest import shrunk_tree


def build(**changes):
    return build_ema(
        torch.nn.Linear(2, 2).parameters(), check_params(shrunk_tree(train=changes, export={"weights": "raw"})).train
    )


def test_ramp_is_diffusers_default():
    ema = build(ema_decay=0.9)
    assert ema.get_decay(1) == 0.0
    assert ema.get_decay(2) == pytest.approx(2 / 11)
    assert ema.get_decay(10_000) == 0.9


def test_warmup_grows_by_its_power():
    ema = build(ema_schedule="warmup", ema_decay=0.9999, ema_inv_gamma=1.0, ema_power=2 / 3)
    assert ema.get_decay(10_001) == pytest.approx(0.99785, abs=1e-5)
    assert ema.get_decay(10**9) == 0.9999


@pytest.mark.parametrize(("sigma_rel", "exponent"), [(0.05, 16.972), (0.10, 6.937)])
def test_exponents_of_edm2(sigma_rel, exponent):
    gamma = power_exponent(sigma_rel)
    assert gamma == pytest.approx(exponent, abs=1e-3)
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(sigma_rel)


def test_power_function_weighs_each_step_by_its_power():
    """After N steps step t counts t^γ-like: exactly by the product of the decays that follow it."""
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = PowerFunctionEMA([weight], sigma_rel=0.1)
    gamma, num = power_exponent(0.1), 50
    for step in range(1, num + 1):
        weight.data.fill_(float(step))
        ema.step([weight])
    edges = torch.arange(num + 1, dtype=torch.float64) ** (gamma + 1) / num ** (gamma + 1)
    expected = (edges.diff() * torch.arange(1, num + 1)).sum()
    assert ema.shadow_params[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_an_average_there_is_none():
    assert build(use_ema=False) is None


def test_averaged_gives_the_weights_back_to_the_bit():
    layer = torch.nn.Linear(3, 3)
    ema = PowerFunctionEMA(layer.parameters(), 0.1)
    layer.weight.data += 0.1
    before = layer.weight.clone()
    with averaged(layer.parameters(), ema):
        assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, before)

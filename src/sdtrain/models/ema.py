"""Exponential moving averages of trained weights: Diffusers' EMAModel, and one with EDM2's profile."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from diffusers.training_utils import EMAModel
from torch import nn

from sdtrain.params.schema import TrainParams


def build_ema(weights: Iterable[nn.Parameter], params: TrainParams) -> EMAModel | None:
    """The average that the params ask for, starting from these weights; None without `use_ema`."""
    if not params.use_ema:
        return None
    if params.ema_schedule == "power_function":
        return PowerFunctionEMA(weights, params.ema_sigma_rel)
    warmup = {"use_ema_warmup": True, "inv_gamma": params.ema_inv_gamma, "power": params.ema_power}
    settings = warmup if params.ema_schedule == "warmup" else {}
    return EMAModel(weights, decay=params.ema_decay, foreach=True, **settings)


class PowerFunctionEMA(EMAModel):
    """An average whose profile keeps its shape as the run grows (Karras et al. 2024, EDM2, section 3.1).

    Step t's decay is (1-1/t)^(γ+1), so the weights of step t count in proportion to t^γ.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], sigma_rel: float) -> None:
        super().__init__(parameters, foreach=True)
        self.exponent = power_exponent(sigma_rel)

    def get_decay(self, optimization_step: int) -> float:
        return (1 - 1 / optimization_step) ** (self.exponent + 1)


def power_exponent(sigma_rel: float) -> float:
    """γ of the profile whose standard deviation is `sigma_rel` of the run: σ² = (γ+1) / ((γ+2)² (γ+3))."""
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


@contextmanager
def averaged(weights: Iterable[nn.Parameter], ema: EMAModel | None) -> Iterator[None]:
    """Within the context the weights are replaced by their average; restored bit-exactly afterwards."""
    if ema is None:
        yield
        return
    weights = list(weights)
    ema.store(weights)
    ema.copy_to(weights)
    try:
        yield
    finally:
        ema.restore(weights)

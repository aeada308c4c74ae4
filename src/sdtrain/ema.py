"""Exponential moving average of the UNet's weights: Diffusers' EMAModel, put in place for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel


@contextmanager
def averaged(unet: UNet2DConditionModel, ema: EMAModel | None) -> Iterator[None]:
    """Within the context `unet` holds the average; afterwards its own weights again, to the bit."""
    if ema is None:
        yield
        return
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    try:
        yield
    finally:
        ema.restore(unet.parameters())

"""When a run says that its learning rate or its length is wrong. The losses are of real runs on the shapes world."""

import math

import pytest

from sdtrain.evaluation.learning import learning_fault

STEPS = (0, 12, 24, 36, 48, 60)


def curves(losses: list[float], peak_lr: float, num_steps: int = 60) -> tuple[list[dict], list[dict]]:
    """Validations at equal distances, and the learning rate of a cosine schedule."""
    steps = [num_steps * number // (len(losses) - 1) for number in range(len(losses))]
    validation = [{"step": s, "loss_raw": loss, "loss_ema": loss} for s, loss in zip(steps, losses, strict=True)]
    lr = [peak_lr * (1 + math.cos(math.pi * step / num_steps)) / 2 for step in range(0, num_steps, 5)]
    return validation, [{"step": 5 * (number + 1), "lr": value} for number, value in enumerate(lr)]


@pytest.mark.parametrize(
    "losses",
    [
        [0.12684, 0.07873, 0.07306, 0.06773, 0.06461, 0.06388],  # a good run
        [0.12684, 0.12004, 0.11900, 0.11880, 0.11870, 0.11865],  # one that gains little, and flattens
        [0.16, 0.15, 0.14, 0.07, 0.05, 0.04],  # one that wakes late, as a ControlNet does
    ],
)
def test_a_run_that_learned_has_no_fault(losses):
    assert learning_fault(*curves(losses, 2e-3)) is None


def test_a_learning_rate_100_times_too_low_is_told():
    found = learning_fault(*curves([0.12684, 0.12004, 0.11546, 0.11311, 0.11182, 0.11166], 2e-5))
    assert "fell by 12.0 % only" in found
    assert "a learning rate of 2e-05 is too low, or the run too short" in found


def test_a_learning_rate_that_is_too_high_is_told():
    found = learning_fault(*curves([0.12684, 0.5, 0.9, 0.7, 0.3, 0.2], 0.2))
    assert "training never lowered the held-out loss, 0.12684 before it and 0.20000 at best (step 60)" in found
    assert "is too high" in found


def test_a_learning_rate_4_times_too_high_is_not_called_too_low():
    """Though what it broke at first it mends as fast at its end as before."""
    found = learning_fault(*curves([0.12875, 0.22542, 0.13914, 0.11037, 0.10157, 0.09811], 8e-3, 100))
    assert "rose from 0.12875 to 0.22542 at step 20 and fell to 0.09811 only" in found
    assert "a learning rate of 0.008 is too high" in found
    assert "too low" not in found


def test_a_small_rise_before_a_small_fall_is_no_fault():
    assert learning_fault(*curves([0.13, 0.135, 0.127, 0.1255, 0.1252, *[0.125] * 6], 1e-5)) is None


def test_a_run_that_ends_above_its_start_is_told():
    found = learning_fault(*curves([0.13, 0.08, 0.09, 0.12, 0.13, 0.14], 2e-3))
    assert "fell from 0.13000 to 0.08000 at step 12 and ended at 0.14000, above its start" in found


def test_without_validations_nothing_is_told():
    validation, train = curves([0.1, 0.2], 1e-3)
    assert learning_fault(validation[:1], train) is None
    assert learning_fault(validation, []) is None

"""What recorded numbers say is wrong with a run, beyond the curves' (test_learning.py) and one condition's use."""

import subprocess
import sys

import pytest

from sdtrain.evaluation import condition_use, held_out
from sdtrain.evaluation.faults import copied, dropped_captions, memorized, run_faults

GOOD = {
    "held_out_loss_base": 0.10, "held_out_loss_trained": 0.04, "text_gap_base": 0.08, "text_gap_trained": 0.06,
    "memorized_gain": 0.001, "memorized_gain_ci_low": -0.001, "memorized_gain_ci_high": 0.003,
}  # fmt: skip
VALIDATION = [
    {"step": step, "loss_raw": loss, "loss_ema": loss, "gap_text": 0.08, "gap_hint": gap}
    for step, loss, gap in ((0, 0.1, 0.0), (50, 0.06, 0.02), (100, 0.04, 0.02))
]
TRAIN = [{"step": step, "lr": 1e-3} for step in range(10, 101, 10)]


def faults(validation=VALIDATION, dropout: float = 0.1, branched: bool = False, **numbers: float) -> list[str]:
    return run_faults(GOOD | numbers, validation, TRAIN, dropout, branched)


def test_a_good_run_has_none():
    assert faults() == []


@pytest.mark.parametrize(("dropout", "is_told"), [(0.0, False), (0.9, False), (0.901, True), (1.0, True)])
def test_captions_that_training_hardly_saw_are_told(dropout, is_told):
    assert (dropped_captions(dropout) is not None) == is_told
    assert len(faults(dropout=dropout)) == is_told


@pytest.mark.parametrize(("gain", "low", "is_told"), [(0.005, 0.001, True), (0.005, 0.0, False), (0.004, 0.001, False)])
def test_memorised_images_are_told_from_a_tenth_of_the_loss_on_if_it_is_sure(gain, low, is_told):
    assert (memorized(gain, low, 0.009, 0.04) is not None) == is_told
    assert len(faults(memorized_gain=gain, memorized_gain_ci_low=low)) == is_told


@pytest.mark.parametrize(("share", "low", "is_told"), [(0.4, 0.11, True), (0.2, 0.1, False), (0.05, 0.02, False)])
def test_copies_are_told_where_surely_more_are_near_than_twice_the_held_out_images(share, low, is_told):
    assert (copied(share, low) is not None) == is_told
    shares = {"near_copy_share_shapes_trained": share, "near_copy_share_shapes_trained_ci_low": low}
    assert len(faults(near_copy_share_shapes_base=0.9, **shares)) == is_told


def test_of_a_condition_the_numbers_of_evaluate_win_over_those_of_the_last_validation():
    (told,) = faults(text_gap_trained=0.001)
    assert told.startswith("the model hardly uses the caption: with another image's caption its held-out loss changes")
    ignored = [*VALIDATION[:-1], VALIDATION[-1] | {"gap_text": 0.0, "gap_hint": 0.0}]
    (told,) = faults(ignored)
    assert told.startswith("the model hardly uses the hint")


def test_where_the_numbers_of_evaluate_cannot_tell_of_captions_the_last_validation_is_asked():
    """Its base hardly uses captions on these images, that of the validation's does."""
    ignored = [*VALIDATION[:-1], VALIDATION[-1] | {"gap_text": 0.0}]
    (told,) = faults(ignored, text_gap_base=-0.0001, text_gap_trained=0.0)
    assert told.startswith("the model hardly uses the caption: with another image's caption its held-out loss changes")
    assert faults(text_gap_base=-0.0001, text_gap_trained=0.0) == []


def test_a_run_that_learned_nothing_is_told_unless_it_started_from_another():
    worse = [*VALIDATION[:1], *({**row, "loss_raw": 0.2, "loss_ema": 0.2, "gap_hint": 0.2} for row in VALIDATION[1:])]
    (told,) = faults(worse)
    assert told.startswith("training never lowered the held-out loss")
    assert faults(worse, branched=True) == []


def test_a_learning_rate_far_too_low_is_told():
    losses = [0.126, 0.123, 0.120, 0.117, 0.114, 0.111]
    slow = [
        VALIDATION[0] | {"step": 20 * place, "loss_raw": loss, "loss_ema": loss, "gap_hint": loss}
        for place, loss in enumerate(losses)
    ]
    (told,) = faults(slow)
    assert "a learning rate of 0.001 is too low, or the run too short" in told


def test_what_a_run_has_not_recorded_is_not_judged():
    assert run_faults({"text_gap_trained": 0.0, "memorized_gain": 9.0}, [], [], 0.1, False) == []


def test_reading_numbers_needs_no_torch():
    code = "import sys, sdtrain.evaluation.faults; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert condition_use._TEXT == held_out.TEXT

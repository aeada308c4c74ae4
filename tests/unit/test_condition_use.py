"""When a run says that its model ignores a condition."""

import pytest

from sdtrain.evaluation.condition_use import unused


@pytest.mark.parametrize(
    ("condition", "gap", "base_share", "is_unused"),
    [
        ("hint", 0.099, 0.5, True),  # of a loss of 1: a tenth
        ("hint", 0.1, 0.5, False),
        ("text", 0.099, 0.5, True),
        ("text", 0.011, 0.02, False),  # half of what the base has
        ("text", 0.009, 0.02, True),
        ("text", 0.0, 0.0, False),  # a base that was never trained
        ("text", 0.0001, 0.001, False),  # captions that are nearly the same
        ("text", 0.001, 0.005, True),
        ("text", None, None, False),  # all captions are the same, as of one object
    ],
)
def test_a_condition_is_used_from_a_share_of_the_loss_on(condition, gap, base_share, is_unused):
    assert (unused(condition, gap, 1.0, base_share) is not None) == is_unused


def test_one_held_out_image_has_no_other_to_swap_with():
    assert "if only one image is held out, this can't be told: hold out more" in unused("hint", None, 1.0, None)

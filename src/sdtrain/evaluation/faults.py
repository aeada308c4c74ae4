"""What is wrong with a run, told from numbers that it recorded: as it ends, and whenever it is looked at again.

Nothing here needs a model or torch. A run whose loss stops being finite ends with an error and records nothing.
"""

from collections.abc import Mapping, Sequence

from sdtrain.evaluation.condition_use import is_judged, unused, unused_at_last
from sdtrain.evaluation.learning import learning_fault
from sdtrain.evaluation.neighbors import NEAR_SHARE

Row = Mapping[str, float | None]
"""Of a table, by column; None where it has no value."""

_MEMORIZED_SHARE = 0.1
"""Told if the loss of training images is lower than that of others by this share of the held-out loss."""
_MOST_DROPPED = 0.9
"""A run that drops a larger share of its captions learns nothing from them."""
_COPIED_SHARE = 2 * NEAR_SHARE
"""Told if surely more of the trained model's images than this are near copies."""
_LOSS, _BASE_LOSS = "held_out_loss_trained", "held_out_loss_base"


def dropped_captions(caption_dropout: float) -> str | None:
    """Why training can't have learned from captions, in a sentence; None if it saw enough of them."""
    if caption_dropout <= _MOST_DROPPED:
        return None
    return (
        f"train.caption_dropout = {caption_dropout}: training hardly saw a caption, so prompts do what they did before "
        "it; 0.1 is usual"
    )


def memorized(gain: float, ci_low: float, ci_high: float, held_out_loss: float) -> str | None:
    """Why a model seems to have learned its images by heart, in a sentence; None if it hasn't.

    Args:
        gain: `memorized_gain` of `memorization.py`, with its 95 % interval.
    """
    if ci_low <= 0 or gain <= _MEMORIZED_SHARE * held_out_loss:
        return None
    return (
        f"the model memorises: the loss of its training images is {gain:.5f} ({ci_low:.5f} to {ci_high:.5f}) lower "
        f"than that of held-out ones as hard, {100 * gain / held_out_loss:.0f} % of the held-out loss; train for fewer "
        "steps, or on more images"
    )


def copied(share: float, ci_low: float) -> str | None:
    """Why a model seems to copy training images, in a sentence; None if it doesn't.

    Args:
        share: `near_copy_share_…` of `neighbors.py`, with the lower bound of its 95 % interval.
    """
    if ci_low <= _COPIED_SHARE:
        return None
    return (
        f"the model copies: {100 * share:.0f} % of what it draws is nearer to a training image, compared with other "
        f"images, than {100 * (1 - NEAR_SHARE):.0f} % of held-out images are; look at data/evaluation/neighbors.json "
        "and its images, train for fewer steps, or on more images"
    )


def run_faults(
    numbers: Mapping[str, float],
    validation: Sequence[Row],
    train: Sequence[Row],
    caption_dropout: float,
    branched: bool,
) -> list[str]:
    """All that is wrong with a finished run, a sentence each; what its stages said of it in warnings.

    Of a condition the numbers of `evaluate` are asked, which are of all held-out images; where these can't tell, those
    of the last validation.

    Args:
        numbers: of metrics/evaluate.json and metrics/image_sets.json, by name; what is missing isn't judged.
        validation: rows of metrics/validation.csv; the first is before training.
        train: rows of metrics/train.csv.
        branched: whether the training started from another run's weights; such a one has learned before.
    """
    found = [dropped_captions(caption_dropout)]
    if validation and not branched:
        found.append(learning_fault(validation, train))
    measured = _measured_use(numbers)
    found += measured.values()
    if validation:
        found += [sentence for condition, sentence in unused_at_last(validation).items() if condition not in measured]
    told = [f"memorized_gain{bound}" for bound in ("", "_ci_low", "_ci_high")]
    if numbers.keys() >= {*told, _LOSS}:
        found.append(memorized(*(numbers[name] for name in (*told, _LOSS))))
    for name, bound in ((name, f"{name}_ci_low") for name in numbers if name.startswith("near_copy_share_")):
        if bound in numbers:
            found.append(copied(numbers[name], numbers[bound]))
    return [sentence for sentence in found if sentence]


def _measured_use(numbers: Mapping[str, float]) -> dict[str, str | None]:
    """By condition whose use the numbers of `evaluate` tell, why the model seems to ignore it; None if it doesn't."""
    found = {}
    for condition in sorted(name.removesuffix("_gap_trained") for name in numbers if name.endswith("_gap_trained")):
        gaps = [f"{condition}_gap_{model}" for model in ("base", "trained")]
        if numbers.keys() >= {*gaps, _LOSS, _BASE_LOSS}:
            base_gap, gap = (numbers[name] for name in gaps)
            base_share = base_gap / numbers[_BASE_LOSS]
            if is_judged(condition, base_share):
                found[condition] = unused(condition, gap, numbers[_LOSS], base_share)
    return found

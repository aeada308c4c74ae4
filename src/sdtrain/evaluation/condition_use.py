"""Whether a model uses what it is told: the condition-use gap of `held_out.py`, judged.

A training loss can't tell: a ControlNet that ignores its hints draws good images all the same.
"""

from collections.abc import Mapping, Sequence

_TEXT = "text"
"""`held_out.TEXT`, which comes with torch."""
_USED_SHARE = 0.1
"""A condition counts as used if the held-out loss rises by this share with another image's."""
_LEAST_SHARE = 0.002
"""A base whose loss rises by no more than twice this with wrong captions can't be a yardstick for captions."""


def is_judged(condition: str, base_share: float | None) -> bool:
    """Whether `unused` can tell: not of captions that even the base hardly uses."""
    return condition != _TEXT or (base_share is not None and base_share / 2 >= _LEAST_SHARE)


def unused(condition: str, gap: float | None, loss: float, base_share: float | None) -> str | None:
    """Why a model seems to ignore a condition, in a sentence; None if it uses it.

    Captions say little about an image that is full of details, so even the base's loss rises by less with wrong ones:
    there half of the base's own share is enough. Where the base hardly uses them itself, because it was never trained
    or because the captions are nearly the same, they aren't judged.

    Args:
        gap: rise of the held-out loss with other images' conditions; None if all images have the same.
        loss: the held-out loss.
        base_share: the base's own gap, as a share of its loss; None if all images have the same.
    """
    name = "caption" if condition == _TEXT else condition
    if not is_judged(condition, base_share):
        return None
    if gap is None:
        return (
            f"all held-out images have the same {name}: there is nothing to learn from it; check the "
            f"data set's {name}s (if only one image is held out, this can't be told: hold out more)"
        )
    needed = _USED_SHARE
    if condition == _TEXT:
        needed = min(needed, base_share / 2)
    if gap >= needed * loss:
        return None
    return (
        f"the model hardly uses the {name}: with another image's {name} its held-out loss changes by {gap:+.5f}, "
        f"{100 * gap / loss:+.1f} % (if it used it, by {100 * needed:.2g} % or more)"
    )


def unused_at_last(validation: Sequence[Mapping[str, float | None]]) -> dict[str, str]:
    """Which conditions the model seems to ignore at the last validation: a sentence for each, by the condition's name.

    Args:
        validation: rows of metrics/validation.csv; the first is before training.
    """
    base, last = validation[0], validation[-1]
    loss, found = last.get("loss_ema", last["loss_raw"]), {}
    for name in (name for name in last if name.startswith("gap_")):
        share = None if base[name] is None else base[name] / base["loss_raw"]
        condition = name.removeprefix("gap_")
        found[condition] = unused(condition, last[name], loss, share)
    return {condition: sentence for condition, sentence in found.items() if sentence}

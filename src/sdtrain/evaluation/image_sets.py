"""What an image encoder says of drawn images: as sets beside real ones, and of each with its caption.

Set metrics are taken between halves, with the floor of real images against real ones: `set_metrics.py` explains both.
"""

from collections.abc import Sequence

import numpy as np

from sdtrain.evaluation.clip_score import clip_score
from sdtrain.evaluation.set_metrics import (
    MIN_VERDICT_IMAGES,
    RANGES,
    against_other_halves,
    differs_from_real,
    interval,
    set_metrics,
)
from sdtrain.ground import randomness
from sdtrain.ground.statistics import bootstrap_interval
from sdtrain.ground.values import Values

_K, _NUM_PROJECTIONS = 5, 256
_NUM_HALVES, _MAX_ROWS = 100, 100_000
"""Halvings, and how many rows they may have in all, down to 20: time grows with the square of the images' number."""
_MIN_IMAGES = 4 * _K
"""Fewer have no neighbourhoods to speak of."""


def image_set_metrics(seed: int, label: str, real: np.ndarray, drawn: dict[str, np.ndarray]) -> dict[str, float]:
    """Numbers of every metric of `set_metrics` that halves have images enough for, by `<metric>_<label>_<model>`.

    Beside the models stands `floor`, of real images against others, with the middle 95 % of its halvings. The trained
    model has a 95 % interval over images, and so has the `gain`, trained minus base, paired. From 200 images on,
    `<metric>_<label>_differs_from_real` is 1 where the trained model's images can be told from real ones, else 0.

    Args:
        label: the encoder's.
        real: features [N, d] of real images.
        drawn: of `base` and `trained`, features [N, d] of what they drew from the same captions.
    """
    num = len(real)
    if num < _MIN_IMAGES:
        print(f"{num} images were drawn, too few to compare sets of them: 200 or more are needed for a verdict")
        return {}

    def measure(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        return set_metrics(x, y, _K, _NUM_PROJECTIONS, seed)

    num_halves = max(20, min(_NUM_HALVES, _MAX_ROWS // num))
    floors = against_other_halves(measure, real, real, num_halves, seed)
    halves = {name: against_other_halves(measure, real, found, num_halves, seed) for name, found in drawn.items()}
    numbers: dict[str, float] = {"num_set_images": num // 2}
    for metric, floor in floors.items():
        stem = f"{metric}_{label}"
        means = {name: values[metric].mean() for name, values in halves.items()}
        numbers |= {f"{stem}_{name}": float(mean) for name, mean in means.items()}
        numbers |= {f"{stem}_floor": float(floor.mean())}
        bounds = {"floor": np.percentile(floor, [2.5, 97.5])}
        gain = halves["trained"][metric] - halves["base"][metric]
        numbers[f"{stem}_gain"] = float(gain.mean())
        trained = np.clip(interval(halves["trained"][metric]), *RANGES.get(metric, (None, None)))
        bounds |= {"trained": trained, "gain": interval(gain)}
        for name, (low, high) in bounds.items():
            numbers |= {f"{stem}_{name}_ci_low": float(low), f"{stem}_{name}_ci_high": float(high)}
        differs = differs_from_real(halves["trained"][metric], floor, num)
        if differs is not None:
            numbers[f"{stem}_differs_from_real"] = int(differs)
    if num < MIN_VERDICT_IMAGES:
        print(f"{num} images were drawn: below {MIN_VERDICT_IMAGES} the floor is too wide to tell them from real ones")
    return numbers


def caption_metrics(
    seed: int,
    num_bootstrap: int,
    label: str,
    items: Sequence[str],
    captions: Sequence[str],
    text_embeds: np.ndarray,
    image_embeds: dict[str, np.ndarray],
    values: Values,
) -> dict[str, float]:
    """CLIPScore of each model's images, `clip_score_<label>_<model>`, and of the real ones, `…_real`.

    The trained model's mean has a 95 % interval over images. The images' own scores are added to `values`.

    Args:
        text_embeds: of the captions, [N, d].
        image_embeds: of `real`, `base` and `trained` images, [N, d].
    """
    stem, numbers = f"clip_score_{label}", {}
    for name, embeds in image_embeds.items():
        scores = clip_score(embeds, text_embeds)
        values.add(stem, name, scores, items, captions)
        numbers[f"{stem}_{name}"] = float(scores.mean())
        if name == "trained":
            low, high = bootstrap_interval(scores, num_bootstrap, randomness.generator(seed, "clip score bootstrap"))
            numbers |= {f"{stem}_trained_ci_low": low, f"{stem}_trained_ci_high": high}
    return numbers

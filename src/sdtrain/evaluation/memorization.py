"""Does the model know its training images better than others of their kind? Two probes that need no other model.

**Gain on training images.** Training lowers the loss of the images that it sees; that of held-out ones only as far as
it generalises. Both losses are taken at the same timesteps with noise that depends on the image alone, of the same
number of images. How hard an image is decides most of its loss, and one set may be harder than the other; so each is
held against what its loss under the base predicts, by a straight line with one slope for both sets (analysis of
covariance: Fisher 1932).

**Guidance magnitude.** A caption that the model has memorised moves its prediction further, already at the first step
of sampling (Wen et al. 2024, "Detecting, explaining, and mitigating memorization in diffusion models"). Again against
held-out captions, and against what the base's magnitude predicts.
"""

import sys

import numpy as np
from transformers import CLIPTokenizer

from sdtrain.evaluation.faults import memorized
from sdtrain.evaluation.held_out import HeldOut
from sdtrain.evaluation.loss_metrics import Denoiser
from sdtrain.ground.statistics import Difference, welch_difference
from sdtrain.ground.values import Values
from sdtrain.models.parts import tokenize


def memorization_metrics(
    models: dict[str, Denoiser],
    held_out: HeldOut,
    held_out_losses: dict[str, np.ndarray],
    seen: HeldOut,
    tokenizer: CLIPTokenizer,
    values: Values,
) -> dict[str, float]:
    """Both probes as numbers; a model that memorises is also told on stderr.

    - `train_loss_<model>`: the loss of training images, as the held-out loss is taken.
    - `memorized_gain`: how much lower the loss of training images is than that of held-out ones as hard for the base.
    - `guidance_magnitude_train_<model>`, `guidance_magnitude_held_out_<model>`: means over captions.
    - `memorized_guidance`: how much larger the magnitude is of training captions than of held-out ones that moved the
      base's prediction as far.

    The last of each has a 95 % interval over images (Welch's, of what is left beside the line); it needs two images of
    each kind. The images' own values are added to `values`.

    Args:
        models: `base` and `trained`.
        held_out_losses: theirs, [images, timesteps].
        seen: as many training images.
    """
    null_ids, numbers = tokenize(tokenizer, [""])[0], {}
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {"gain": {}, "guidance": {}}
    train_losses = {name: model.losses(seen) for name, model in models.items()}
    for kind, images, losses in (("train", seen, train_losses), ("held_out", held_out, held_out_losses)):
        of_images = images.ids, images.captions(tokenizer)
        magnitudes = {name: model.guidance_magnitudes(images, null_ids) for name, model in models.items()}
        for name in models:
            values.add(f"guidance_magnitude_{kind}", name, magnitudes[name], *of_images)
            numbers[f"guidance_magnitude_{kind}_{name}"] = magnitudes[name].mean()
            if kind == "train":
                values.add("train_loss", name, losses[name], *of_images, images.timesteps.tolist())
                numbers[f"train_loss_{name}"] = losses[name].mean()
        found["gain"][kind] = {name: -losses[name].mean(axis=1) for name in models}
        found["guidance"][kind] = magnitudes
    held_out_loss = held_out_losses["trained"].mean()
    for probe, values_of in found.items():
        excess = _excess(values_of["train"], values_of["held_out"])
        if excess is None:  # one image
            continue
        numbers |= {
            f"memorized_{probe}": excess.mean,
            f"memorized_{probe}_ci_low": excess.ci_low,
            f"memorized_{probe}_ci_high": excess.ci_high,
        }
        told = (excess.mean, excess.ci_low, excess.ci_high, held_out_loss)
        if probe == "gain" and (fault := memorized(*told)):
            print(f"WARNING: {fault}", file=sys.stderr)
    return {name: float(number) for name, number in numbers.items()}


def _excess(seen: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> Difference | None:
    """How much larger the trained model's values are of `seen` images than of others, at equal values of the base.

    Args:
        seen: [images] of `base` and of `trained`.
        others: likewise.
    """
    sets = (seen, others)
    centred = [[values[name] - values[name].mean() for name in ("base", "trained")] for values in sets]
    spread = sum(base @ base for base, _ in centred)
    slope = sum(base @ trained for base, trained in centred) / spread if spread else 0.0
    return welch_difference(*(values["trained"] - slope * values["base"] for values in sets))

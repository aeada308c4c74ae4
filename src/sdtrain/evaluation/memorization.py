"""Does the model know its training images better than others of their kind? Two probes that need no other model.

**Gain on training images.** Training lowers the loss of the images that it sees; that of held-out ones only as far as
it generalises. Both losses are taken at the same timesteps with noise that depends on the image alone, of the same
number of images, and both as differences to the base's, since one set may be harder than the other: what remains is
the model's own.

**Guidance magnitude.** A caption that the model has memorised moves its prediction further, already at the first step
of sampling (Wen et al. 2024, "Detecting, explaining, and mitigating memorization in diffusion models"). Again against
held-out captions, and against the base.
"""

import sys

import numpy as np
from transformers import CLIPTokenizer

from sdtrain.evaluation.held_out import HeldOut
from sdtrain.evaluation.loss_metrics import Denoiser
from sdtrain.ground.statistics import welch_difference
from sdtrain.ground.values import Values
from sdtrain.models.parts import tokenize

_MEMORIZED_SHARE = 0.1
"""Told if training lowered the loss of its own images by this share of the held-out loss more than that of others."""


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
    - `memorized_gain`: how much more the loss fell from base to trained on training images than on held-out ones.
    - `guidance_magnitude_train_<model>`, `guidance_magnitude_held_out_<model>`: means over captions.
    - `memorized_guidance`: how much more the magnitude rose from base to trained for training captions.

    The last of each has a 95 % interval over images (Welch). The images' own values are added to `values`.

    Args:
        models: `base` and `trained`.
        held_out_losses: theirs, [images, timesteps].
        seen: as many training images.
    """
    null_ids, numbers, rises = tokenize(tokenizer, [""])[0], {}, {}
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
        gains = (losses["base"] - losses["trained"]).mean(axis=1)
        rises[kind] = {"gain": gains, "guidance": magnitudes["trained"] - magnitudes["base"]}
    held_out_loss = held_out_losses["trained"].mean()
    for probe in ("gain", "guidance"):
        excess = welch_difference(rises["train"][probe], rises["held_out"][probe])
        if excess is None:  # one image
            continue
        numbers |= {
            f"memorized_{probe}": excess.mean,
            f"memorized_{probe}_ci_low": excess.ci_low,
            f"memorized_{probe}_ci_high": excess.ci_high,
        }
        if probe == "gain" and excess.ci_low > 0 and excess.mean > _MEMORIZED_SHARE * held_out_loss:
            print(
                f"WARNING: the model memorises: training lowered the loss of its own images by {excess.mean:.5f} more "
                f"than that of held-out ones ({excess.ci_low:.5f} to {excess.ci_high:.5f}), "
                f"{100 * excess.mean / held_out_loss:.0f} % of the held-out loss; train for fewer steps, or on more "
                "images",
                file=sys.stderr,
            )
    return {name: float(number) for name, number in numbers.items()}

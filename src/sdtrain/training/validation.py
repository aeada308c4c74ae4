"""The held-out loss and the images of a run, by all of its processes."""

import math
from dataclasses import dataclass

from diffusers import SchedulerMixin
from PIL import Image

from sdtrain.data.shards import LatentShards, held_out_pictures
from sdtrain.evaluation.held_out import HeldOut, conditions_of
from sdtrain.ground.manifests import encoders_fingerprint
from sdtrain.models.ema import averaged
from sdtrain.models.pipelines import Conditions, generate
from sdtrain.training.files import TrainFiles
from sdtrain.training.trainer import Trainer


def held_out_shards(files: TrainFiles) -> LatentShards:
    """The held-out split of the latent cache."""
    return LatentShards(files.latents, "validation", encoders_fingerprint(files.base))


def build_held_out(trainer: Trainer, files: TrainFiles) -> HeldOut:
    """The questions that the run's validations ask.

    Raises:
        InputError: the cache lacks a column that the method needs.
    """
    shards, validation = held_out_shards(files), trainer.params.validation
    shards.check_columns(trainer.method.columns)
    return HeldOut(
        shards,
        trainer.parts.vae.config.scaling_factor,
        num_train_timesteps=trainer.scheduler.config.num_train_timesteps,
        num_timesteps=validation.num_timesteps,
        max_samples=validation.max_samples,
        batch_size=validation.batch_size,
    )


def held_out_losses(
    trainer: Trainer, held_out: HeldOut, scheduler: SchedulerMixin, swapped: str | None = None
) -> list[float]:
    """Mean held-out loss at each timestep of the current weights, computed by all processes together.

    Args:
        swapped: a condition that each image takes from another.
    """
    with trainer.accelerator.autocast():
        losses = held_out.losses(trainer.method, scheduler, trainer.share, swapped)
    return trainer.accelerator.reduce(losses, "sum").mean(dim=0).tolist()


@dataclass(frozen=True)
class Validation:
    """What one validation found."""

    losses: dict[str, list[float]]
    """Held-out loss at each timestep, by kind of weights: `raw` and, if kept, `ema`."""
    gaps: dict[str, float | None]
    """By condition, the condition-use gap of the EMA's weights, else of the raw ones; None if all images share it."""
    images: list[Image.Image]
    """Of the main process, for each of `drawn_prompts`; of the others none."""


def validate(trainer: Trainer, held_out: HeldOut) -> Validation:
    """Held-out losses, condition-use gaps and images."""
    losses = {"raw": held_out_losses(trainer, held_out, trainer.scheduler)}
    with averaged(trainer.weights.values(), trainer.ema):
        if trainer.ema is not None:
            losses["ema"] = held_out_losses(trainer, held_out, trainer.scheduler)
        gaps = condition_gaps(trainer, held_out, trainer.scheduler, losses.get("ema", losses["raw"]))
    return Validation(losses, gaps, draw_images(trainer, held_out) if trainer.accelerator.is_main_process else [])


def condition_gaps(
    trainer: Trainer, held_out: HeldOut, scheduler: SchedulerMixin, right: list[float]
) -> dict[str, float | None]:
    """By condition, the rise of the mean held-out loss of the current weights when images swap that condition.

    Args:
        right: the losses at each timestep without swapping.
    """
    gaps: dict[str, float | None] = {}
    for condition in conditions_of(trainer.method):
        if held_out.differs(condition):
            wrong = held_out_losses(trainer, held_out, scheduler, swapped=condition)
            gaps[condition] = math.fsum(wrong) / len(wrong) - math.fsum(right) / len(right)
        else:
            gaps[condition] = None
    return gaps


def drawn_prompts(trainer: Trainer, held_out: HeldOut) -> list[str]:
    """What `draw_images` draws: prompts, or held-out captions; may be none."""
    return _drawn(trainer, held_out, conditions=())[0]


def draw_images(trainer: Trainer, held_out: HeldOut) -> list[Image.Image]:
    """An image of the averaged weights, or if there is no average of the current ones, for each of `drawn_prompts`."""
    validation = trainer.params.validation
    prompts, conditions = _drawn(trainer, held_out, trainer.method.conditions)
    if not prompts:
        return []
    with averaged(trainer.weights.values(), trainer.ema):
        trainer.method.trained.eval()
        images = generate(
            trainer.method.pipeline(trainer.scheduler),
            prompts,
            list(range(len(prompts))),
            conditions=conditions,
            batch_size=validation.batch_size,
            num_inference_steps=validation.num_inference_steps,
            guidance_scale=validation.guidance_scale,
        )
        trainer.method.trained.train()
    return images


def _drawn(trainer: Trainer, held_out: HeldOut, conditions: tuple[str, ...]) -> tuple[list[str], Conditions]:
    """Prompts and, of held-out images, these conditions."""
    validation = trainer.params.validation
    if validation.num_held_out is None:
        return validation.prompts, {}
    return held_out_pictures(held_out.shards, conditions, validation.num_held_out)

"""The held-out loss and the images of a run, by all of its processes."""

from diffusers import SchedulerMixin
from PIL import Image

from sdtrain.data.shards import LatentShards
from sdtrain.evaluation.held_out import HeldOut
from sdtrain.ground.manifests import encoders_fingerprint
from sdtrain.models.ema import averaged
from sdtrain.models.pipelines import generate
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


def held_out_losses(trainer: Trainer, held_out: HeldOut, scheduler: SchedulerMixin) -> list[float]:
    """Mean held-out loss at each timestep of the current weights, computed by all processes together."""
    with trainer.accelerator.autocast():
        losses = held_out.losses(trainer.method, scheduler, trainer.share)
    return trainer.accelerator.reduce(losses, "sum").mean(dim=0).tolist()


def validate(
    trainer: Trainer, held_out: HeldOut, show_images: bool
) -> tuple[dict[str, list[float]], list[Image.Image]]:
    """Held-out loss at each timestep of the `raw` weights and, if kept, the `ema`; images of the latter, if wanted."""
    validation, images = trainer.params.validation, []
    losses = {"raw": held_out_losses(trainer, held_out, trainer.scheduler)}
    with averaged(trainer.weights.values(), trainer.ema):
        if trainer.ema is not None:
            losses["ema"] = held_out_losses(trainer, held_out, trainer.scheduler)
        if show_images:
            trainer.method.trained.eval()
            images = generate(
                trainer.method.pipeline(trainer.scheduler),
                validation.prompts,
                list(range(len(validation.prompts))),
                batch_size=validation.batch_size,
                num_inference_steps=validation.num_inference_steps,
                guidance_scale=validation.guidance_scale,
            )
            trainer.method.trained.train()
    return losses, images

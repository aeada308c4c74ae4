"""What a training method is: what trains, what it sees, and what is minimised.

The loop, the step, saved states, checkpoints, the held-out loss, the memory estimate and the export use only
what a `Method` has; `trained_parameters` is the one definition of a run's weights.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from transformers import CLIPTextModel

from sdtrain.data.batches import Batch
from sdtrain.data.shards import Column
from sdtrain.ground.diffusion import Objective, add_noise, min_snr_weights, prediction_target
from sdtrain.methods.exports import Exported
from sdtrain.params.schema import ExportParams

LossPass = Callable[[nn.Module, Batch, Objective], dict[str, Tensor]]
"""From (`trained`, wrapped for several processes; a batch of B rows; the objective) to float32 values of each row,
[B]: `loss` is minimised, the others are only logged."""

Predict = Callable[[nn.Module, Tensor, Tensor, Batch], Tensor]
"""`Method.predict`."""


class Method(Protocol):
    """What trains, what it sees, what is minimised."""

    trained: nn.Module
    """Holds the run's weights: its parameters with `requires_grad`. Several processes wrap it in DDP, so a loss pass
    calls the module that it is given, not this one."""
    columns: dict[str, Column]
    """Further columns of the latent cache that its batches need, by name. Where the shape depends on the latents',
    their size is the UNet's `config.sample_size`."""
    conditions: tuple[str, ...]
    """Those of the columns whose use is measured: what the model should see besides the caption."""
    losses: tuple[LossPass, ...]
    """Each makes one backward pass, and their losses add up. What they draw at random follows from `batch.seeds`.
    The last one must reach every trained parameter: with several processes it is the one that sums gradients."""
    logged: tuple[str, ...]
    """What the loss passes return besides `loss`: columns of the training curve."""

    def predict(self, model: nn.Module, noisy_latents: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """What the denoiser predicts, [B, C, h, w], in training and for the held-out loss.

        Args:
            model: `trained`, wrapped or not.
            noisy_latents: [B, C, h, w].
            timesteps: int64 [B].
            batch: all other inputs of these rows.
        """

    def save(self, folder: Path) -> None:
        """Write the trained weights to an empty folder, in Diffusers' own layout."""

    def load(self, folder: Path) -> None:
        """Load the weights that `save` wrote, in place.

        Raises:
            InputError: they have another structure, or aren't there.
        """

    def pipeline(self, scheduler: DDPMScheduler) -> DiffusionPipeline:
        """A pipeline around the current weights, with the noise schedule that they were trained on."""

    def export(self, folder: Path, scheduler: DDPMScheduler, params: ExportParams, base: Path) -> Iterator[Exported]:
        """Write the current weights in every form that the params ask for; yields each form once it is written.

        Args:
            folder: has the `training_config.json` already.
            base: the folder of the base, for forms that need it to be loaded.

        Raises:
            InputError: a form can't hold the model.
        """


def trained_parameters(method: Method) -> dict[str, nn.Parameter]:
    """The run's weights by name, in the module's order."""
    return {name: p for name, p in method.trained.named_parameters() if p.requires_grad}


def enable_gradient_checkpointing(modules: Iterable[nn.Module], recompute: Callable | None = None) -> None:
    """Recompute activations in the backward pass, in every Diffusers model among the modules and inside them.

    Args:
        recompute: replaces Diffusers' own call of torch.utils.checkpoint.
    """
    for module in {id(inner): inner for outer in modules for inner in outer.modules()}.values():
        if isinstance(module, ModelMixin) and module._supports_gradient_checkpointing:
            module.enable_gradient_checkpointing(recompute)


def denoising_loss(predict: Predict) -> LossPass:
    """The squared error of the prediction, with min-SNR weights if the objective has a γ (Ho et al. 2020, eq. 14)."""

    def losses(model: nn.Module, batch: Batch, objective: Objective) -> dict[str, Tensor]:
        noisy_latents = add_noise(batch.latents, batch.input_noise, batch.timesteps, objective.alphas_cumprod)
        return {"loss": denoising_error(predict(model, noisy_latents, batch.timesteps, batch), batch, objective)}

    return losses


def denoising_error(model_pred: Tensor, batch: Batch, objective: Objective) -> Tensor:
    """What `denoising_loss` minimises, of a prediction, float32 [B]."""
    alphas_cumprod, prediction_type = objective.alphas_cumprod, objective.prediction_type
    target = prediction_target(batch.latents, batch.noise, batch.timesteps, alphas_cumprod, prediction_type)
    loss = (model_pred.float() - target).square().mean(dim=(1, 2, 3))
    if objective.snr_gamma is not None:
        loss = loss * min_snr_weights(batch.timesteps, alphas_cumprod, objective.snr_gamma, prediction_type)
    return loss


def predict_from_text(
    text_encoder: CLIPTextModel, unet: nn.Module, noisy_latents: Tensor, timesteps: Tensor, batch: Batch
) -> Tensor:
    """What a UNet predicts under the captions alone."""
    return unet(noisy_latents, timesteps, encode_text(text_encoder, batch)).sample


def encode_text(text_encoder: CLIPTextModel, batch: Batch) -> Tensor:
    """The frozen encoder's hidden states, float32 [B, L, D], whatever precision the caller computes in."""
    with torch.no_grad(), in_fp32(batch.input_ids.device.type):
        hidden_states = text_encoder(batch.input_ids).last_hidden_state
        return hidden_states if batch.caption_rows is None else hidden_states[batch.caption_rows]


@contextmanager
def in_fp32(device_type: str) -> Iterator[None]:
    """Without autocast, whatever precision the caller computes in."""
    token = AUTOCASTS.set(False)
    can_autocast = torch.amp.is_autocast_available(device_type)
    try:
        with torch.autocast(device_type, enabled=False) if can_autocast else nullcontext():
            yield
    finally:
        AUTOCASTS.reset(token)


AUTOCASTS: ContextVar[bool] = ContextVar("AUTOCASTS", default=True)
"""False inside `in_fp32`: for devices on which autocast has to be imitated, see `training/memory.py`."""

"""The parts of a base model, loaded from a folder in the Diffusers layout in fp32, frozen, in eval mode."""

from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sdtrain.diffusion import PredictionType
from sdtrain.errors import InputError


def pick_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def hide_progress_bars() -> None:
    """Hide the bars that Diffusers and Transformers draw while they load and save weights."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def load_vae(base: Path) -> AutoencoderKL:
    return _frozen(AutoencoderKL.from_pretrained(base, subfolder="vae", dtype=torch.float32))


def load_text_encoder(base: Path) -> CLIPTextModel:
    hide_progress_bars()
    return _frozen(CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32))


def load_tokenizer(base: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")


def load_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet whose config and weights lie in `folder` itself."""
    return _frozen(UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32))


def load_scheduler(base: Path) -> DDPMScheduler:
    """The base's noise schedule and prediction type, as DDPM."""
    return DDPMScheduler.from_pretrained(base, subfolder="scheduler")


def training_scheduler(base: Path, prediction_type: PredictionType, zero_terminal_snr: bool) -> DDPMScheduler:
    """The schedule that the UNet is trained on: the base's, with this prediction type and terminal SNR.

    A schedule with zero terminal SNR (Lin et al. 2024, "Common diffusion noise schedules and sample
    steps are flawed") is sampled with trailing timesteps, so that sampling starts where training ends.

    Raises:
        InputError: the base's own schedule has zero terminal SNR, and `zero_terminal_snr` is false.
    """
    config = load_scheduler(base).config
    if config.rescale_betas_zero_snr and not zero_terminal_snr:
        raise InputError(
            "train.zero_terminal_snr = False: the base's scheduler has rescale_betas_zero_snr = true; "
            "set train.zero_terminal_snr: true (and train.prediction_type: v_prediction)"
        )
    changes = {"prediction_type": prediction_type}
    if zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return DDPMScheduler.from_config(config, **changes)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids int64 [len(captions), model_max_length], padded and truncated as Stable Diffusion does."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def _frozen(module):
    return module.requires_grad_(False).eval()

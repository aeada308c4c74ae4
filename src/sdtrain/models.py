"""The parts of a base model, loaded from a folder in the Diffusers layout in fp32, frozen, in eval mode."""

from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


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


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids int64 [len(captions), model_max_length], padded and truncated as Stable Diffusion does."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def _frozen(module):
    return module.requires_grad_(False).eval()

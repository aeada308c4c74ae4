"""The parts of a Stable Diffusion model, loaded from a folder in the Diffusers layout in fp32, frozen, in eval mode."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtrain.ground.diffusion import PredictionType
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json
from sdtrain.ground.layout import CONTROLNET, UNET_OFFSET


@dataclass
class Parts:
    """All parts of a model, on one device."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer | None
    """None in `meta_parts`."""
    scheduler: DDPMScheduler
    """The noise schedule and prediction type that `unet` was trained with."""
    others: dict[str, nn.Module] = field(default_factory=dict)
    """Further modules of a loaded pipeline, by its names for them, e.g. `controlnet`."""

    def modules(self) -> tuple[nn.Module, ...]:
        """The parts that hold weights."""
        return self.unet, self.vae, self.text_encoder, *self.others.values()

    def set_resolution(self, resolution: int) -> None:
        """Set the size, in px, of the squares that pipelines draw: that of the UNet's training."""
        size = resolution // vae_factor(self.vae.config.block_out_channels)
        # Pipelines reset the size of UNets saved by Diffusers before 0.9, such as SD 1.5's.
        self.unet.register_to_config(sample_size=size, _diffusers_version=diffusers.__version__)

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        for module in self.modules():
            module.to(device)


def load_parts(folder: Path, others: Sequence[str] = ()) -> Parts:
    """The parts of a base or of an exported model, with these `others` as well.

    Raises:
        InputError: it doesn't have the others.
    """
    hide_progress_bars()
    return Parts(
        unet=load_unet(folder / "unet"),
        vae=load_vae(folder),
        text_encoder=load_text_encoder(folder),
        tokenizer=load_tokenizer(folder),
        scheduler=DDPMScheduler.from_pretrained(folder, subfolder="scheduler"),
        others=load_others(folder, others),
    )


def load_others(folder: Path, names: Sequence[str]) -> dict[str, nn.Module]:
    """Further parts of a base, by name.

    Raises:
        InputError: it doesn't have them.
    """
    for name in names:
        if not (folder / name / "config.json").exists():
            raise InputError(
                f"{folder} has no {name} to start from; set base.{name}_repo, or base.path to a folder with {name}/, "
                "then run `dvc repro`"
            )
    return {name: _OTHERS[name](folder / name) for name in names}


def parts_of(pipeline: DiffusionPipeline) -> Parts:
    """All parts of a loaded pipeline, with its scheduler as DDPM."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    parts = Parts(
        unet=modules.pop("unet"),
        vae=modules.pop("vae"),
        text_encoder=modules.pop("text_encoder"),
        tokenizer=pipeline.tokenizer,
        scheduler=DDPMScheduler.from_config(pipeline.scheduler.config),
        others=modules,
    )
    for module in parts.modules():
        _frozen(module)
    return parts


@dataclass(frozen=True)
class Configs:
    """The `config.json` of a model's parts."""

    unet: dict
    vae: dict
    text_encoder: dict

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Channels, height and width of the latent of a square of `resolution` px: (4, 64, 64) for SD 1.5's 512."""
        size = resolution // vae_factor(self.vae["block_out_channels"])
        return self.vae["latent_channels"], size, size


def read_configs(folder: Path) -> Configs:
    """Read the configs of a model's folder.

    Raises:
        InputError: one is missing or broken.
    """
    return Configs(*(read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder")))


def vae_factor(block_out_channels: Sequence[int]) -> int:
    """By how much a VAE with these blocks reduces a side: each but the last halves it."""
    return 2 ** (len(block_out_channels) - 1)


def meta_parts(configs: Configs, sample_size: int) -> Parts:
    """Parts with these configs but without weights: on torch's meta device, which allocates and computes nothing."""
    with torch.device("meta"):
        return Parts(
            unet=_frozen(UNet2DConditionModel.from_config({**configs.unet, "sample_size": sample_size})),
            vae=_frozen(AutoencoderKL.from_config(configs.vae)),
            text_encoder=_frozen(CLIPTextModel(CLIPTextConfig(**configs.text_encoder))),
            tokenizer=None,
            scheduler=DDPMScheduler(),
        )


def load_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet whose config and weights are in `folder` itself."""
    return _frozen(UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32))


def load_controlnet(folder: Path) -> ControlNetModel:
    """The ControlNet whose config and weights are in `folder` itself.

    Raises:
        InputError: they are missing or damaged, or don't match each other.
    """
    try:
        return _frozen(ControlNetModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: its ControlNet can't be loaded: {error}") from None


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE of a model's folder."""
    return _frozen(AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32))


def load_text_encoder(folder: Path) -> CLIPTextModel:
    """The text encoder of a model's folder."""
    return _frozen(CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32))


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a model's folder."""
    return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")


def training_scheduler(
    base_scheduler: DDPMScheduler, prediction_type: PredictionType, zero_terminal_snr: bool
) -> DDPMScheduler:
    """The schedule to train on: the base's, with this prediction type and terminal SNR.

    A schedule with zero terminal SNR (Lin et al. 2024, "Common diffusion noise schedules and sample
    steps are flawed") is sampled with trailing timesteps, so that sampling starts where training ends.

    Raises:
        InputError: the base's own schedule has zero terminal SNR, and `zero_terminal_snr` is false.
    """
    config = base_scheduler.config
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


def pick_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def hide_progress_bars() -> None:
    """Hide the bars that Diffusers and Transformers draw while they load and save weights."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _frozen(module):
    return module.requires_grad_(False).eval()


_OTHERS = {CONTROLNET: load_controlnet, UNET_OFFSET: load_unet}

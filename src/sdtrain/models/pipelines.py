"""Images from prompts and conditions, with stock Diffusers' pipelines and DPM-Solver++ (Lu et al. 2022)."""

from pathlib import Path

import torch
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from torch import Tensor

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json
from sdtrain.ground.layout import LIGHT_ENCODER
from sdtrain.ground.processes import ALONE, Processes
from sdtrain.models.ic_light import IcLightPipeline
from sdtrain.models.parts import Parts, hide_progress_bars, pick_device

Conditions = dict[str, list[Image.Image] | list[Tensor]]
"""By a condition's name, one image per prompt; or a tensor: unscaled latents [4, h, w], a light map [H, W, 3]."""
_ARGUMENTS = {"hint": "image"}
"""A condition's name among a pipeline's arguments, where that is another."""


def build_pipeline(parts: Parts, scheduler: DDPMScheduler) -> StableDiffusionPipeline:
    """A pipeline of these parts for DPM-Solver++ on the noise schedule that the UNet was trained on."""
    return _quiet(StableDiffusionPipeline(**_components(parts, scheduler), requires_safety_checker=False))


def build_controlnet_pipeline(
    parts: Parts, controlnet: ControlNetModel, scheduler: DDPMScheduler
) -> StableDiffusionControlNetPipeline:
    """As `build_pipeline`, with a ControlNet."""
    components = _components(parts, scheduler)
    return _quiet(StableDiffusionControlNetPipeline(**components, controlnet=controlnet, requires_safety_checker=False))


def build_ic_light_pipeline(parts: Parts, scheduler: DDPMScheduler) -> IcLightPipeline:
    """As `build_pipeline`, with conditions for the UNet, and with the parts' `light_encoder` if they have one."""
    components = _components(parts, scheduler)
    return _quiet(IcLightPipeline(**components, light_encoder=parts.others.get(LIGHT_ENCODER)))


def _components(parts: Parts, scheduler: DDPMScheduler) -> dict:
    return {
        "vae": parts.vae,
        "text_encoder": parts.text_encoder,
        "tokenizer": parts.tokenizer,
        "unet": parts.unet,
        "scheduler": DPMSolverMultistepScheduler.from_config(scheduler.config),
        "safety_checker": None,
        "feature_extractor": None,
    }


def _quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """The pipeline of a Diffusers folder in fp32, on the accelerator where there is one; an IC-Light's, too.

    Raises:
        InputError: the folder isn't a Diffusers model.
    """
    return read_pipeline(folder).to(pick_device())


def read_pipeline(folder: Path) -> DiffusionPipeline:
    """As `load_pipeline`, on the CPU."""
    if not (folder / "model_index.json").exists():
        raise InputError(f"{folder}: not a Diffusers model (it has no model_index.json)")
    hide_progress_bars()
    index = read_json(folder / "model_index.json")
    is_ic_light = isinstance(index, dict) and index.get("_class_name") == IcLightPipeline.__name__
    kind = IcLightPipeline if is_ic_light else DiffusionPipeline  # which knows Diffusers' own classes
    return _quiet(kind.from_pretrained(folder, dtype=torch.float32, safety_checker=None))


def seen_by(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    """The conditions that its images need, by name."""
    if isinstance(pipeline, StableDiffusionControlNetPipeline):
        return ("hint",)
    if not isinstance(pipeline, IcLightPipeline):
        return ()
    light = () if pipeline.light_encoder is None else ("light",)
    return ("foreground", *(("background",) if pipeline.unet.config.in_channels == 12 else ()), *light)


def drawn_px(pipeline: DiffusionPipeline) -> int:
    """Side of the squares that it draws."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def generate(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    conditions: Conditions | None = None,
    negative_prompt: str = "",
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    processes: Processes = ALONE,
) -> list[Image.Image]:
    """One image per prompt and seed, RGB, at the UNet's own size.

    Each image's noise comes from its own seed, so it doesn't depend on the others or on
    `batch_size`, and stock Diffusers draws the same image with `torch.Generator("cpu").manual_seed(seed)`.

    Args:
        conditions: what the model sees besides each prompt, images at the size of those drawn.
        processes: who share the batches; each gets all images.
    """
    conditions = conditions or {}
    assert all(len(given) == len(prompts) for given in (seeds, *conditions.values())), "one of each per prompt"
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)

    @torch.inference_mode()
    def draw(chunk: slice) -> list[Image.Image]:
        return pipeline(
            prompts[chunk],
            negative_prompt=[negative_prompt] * len(prompts[chunk]),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[chunk]],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            **{_ARGUMENTS.get(name, name): _stacked(given[chunk]) for name, given in conditions.items()},
        ).images

    chunks = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    return [image for images in processes.map(draw, chunks) for image in images]


def _stacked(given: list[Image.Image] | list[Tensor]) -> list[Image.Image] | Tensor:
    return torch.stack(given) if isinstance(given[0], Tensor) else given

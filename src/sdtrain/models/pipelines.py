"""Images from prompts, with stock Diffusers: StableDiffusionPipeline and DPM-Solver++ (Lu et al. 2022)."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from sdtrain.ground.errors import InputError
from sdtrain.models.parts import Parts, hide_progress_bars, pick_device


def build_pipeline(parts: Parts, scheduler: DDPMScheduler) -> StableDiffusionPipeline:
    """A pipeline of these parts for DPM-Solver++ on the noise schedule that the UNet was trained on."""
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=DPMSolverMultistepScheduler.from_config(scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """The pipeline of a Diffusers folder in fp32, on the accelerator where there is one.

    Raises:
        InputError: the folder isn't a Diffusers model.
    """
    if not (folder / "model_index.json").exists():
        raise InputError(f"{folder}: not a Diffusers model (it has no model_index.json)")
    hide_progress_bars()
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(pick_device())


def generate(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    negative_prompt: str = "",
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
) -> list[Image.Image]:
    """One image per prompt and seed, RGB, at the UNet's own size.

    Each image's noise comes from its own seed, so it doesn't depend on the others or on
    `batch_size`, and stock Diffusers draws the same image with `torch.Generator("cpu").manual_seed(seed)`.
    """
    assert len(prompts) == len(seeds), f"{len(prompts)} prompts, {len(seeds)} seeds"
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    images = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        with torch.inference_mode():
            images += pipeline(
                prompts[chunk],
                negative_prompt=[negative_prompt] * len(prompts[chunk]),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[chunk]],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            ).images
    return images

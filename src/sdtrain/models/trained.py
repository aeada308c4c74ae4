"""Loads what was trained: a base as it was trained on, and exported models."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json, sha256_json
from sdtrain.ground.headers import read_metadata
from sdtrain.ground.layout import ADAPTER_FILE, CONTROLNET_FILE, LIGHT_ENCODER, MERGED, UNET_OFFSET
from sdtrain.ground.manifests import BaseManifest
from sdtrain.models.ic_light import IcLightPipeline, LightEncoder
from sdtrain.models.offsets import load_offsets, merge_offsets
from sdtrain.models.parts import Parts, load_controlnet, load_parts, pick_device, training_scheduler
from sdtrain.models.pipelines import (
    build_controlnet_pipeline,
    build_ic_light_pipeline,
    build_pipeline,
    load_pipeline,
    read_pipeline,
)


def load_base_of(folder: Path, base: Path, others: Sequence[str] = ()) -> tuple[Parts, DDPMScheduler]:
    """The base that the `training_config.json` in `folder` names, at its resolution, and its noise schedule.

    Args:
        base: the folder of that base.
        others: further parts of it.

    Raises:
        InputError: it is another base, or doesn't have the others.
    """
    config = read_json(folder / "training_config.json")
    is_resolved = (base / "manifest.json").exists()
    if is_resolved and sha256_json(BaseManifest.read(base).files) != config["identity"]["base"]:
        raise InputError(
            f"{folder}: was trained on another base than {base}; run `dvc repro`, or use the base's folder"
        )
    parts = load_parts(base, others)
    parts.set_resolution(config["params"]["precompute"]["resolution"])
    train = config["params"]["train"]
    return parts, training_scheduler(parts.scheduler, train["prediction_type"], train["zero_terminal_snr"])


def load_adapted(folder: Path, base: Path, file: str = ADAPTER_FILE) -> StableDiffusionPipeline:
    """The base with an exported adapter, in fp32 on the CPU.

    Raises:
        InputError: its file is missing or damaged, or it was trained on another base.
    """
    read_metadata(folder / file)  # which checks that the file is whole
    pipeline = build_pipeline(*load_base_of(folder, base))
    # As load_lora_weights does, which warns that there is no adapter of the text encoder.
    adapter, alphas, metadata = pipeline.lora_state_dict(folder, weight_name=file, return_lora_metadata=True)
    pipeline.load_lora_into_unet(adapter, alphas, pipeline.unet, metadata=metadata, _pipeline=pipeline)
    return pipeline


def load_controlled(folder: Path, base: Path, file: str | None = None) -> StableDiffusionControlNetPipeline:
    """The base with an exported ControlNet, in fp32 on the CPU.

    Args:
        file: take the weights from this file in the folder, not from Diffusers' own.

    Raises:
        InputError: its weights or that file are missing or damaged, or it was trained on another base.
    """
    for name in (CONTROLNET_FILE, file or CONTROLNET_FILE):
        read_metadata(folder / name)  # which checks that the file is whole
    controlnet = load_controlnet(folder)
    if file is not None:
        controlnet.load_state_dict(load_file(folder / file))
    parts, scheduler = load_base_of(folder, base)
    return build_controlnet_pipeline(parts, controlnet, scheduler)


def load_relit(folder: Path, base: Path, file: str | None = None) -> IcLightPipeline:
    """An exported IC-Light, in fp32 on the CPU.

    Args:
        base: the folder of its base; matters with `file` only.
        file: take the UNet's weights from the base and the offsets in this file of the folder, in either key layout.

    Raises:
        InputError: that file is missing or damaged or doesn't match the base, it was trained on another base, or the
            folder has no IC-Light.
    """
    if file is None:
        pipeline = read_pipeline(folder)
        if not isinstance(pipeline, IcLightPipeline):
            raise InputError(f"{folder}: not an IC-Light, but a {type(pipeline).__name__}")
        return pipeline
    parts, scheduler = load_base_of(folder, base)
    merge_offsets(parts.unet, load_offsets(folder / file, parts.unet.config), folder / file)
    if (folder / LIGHT_ENCODER / "config.json").exists():
        encoder = LightEncoder.from_pretrained(folder / LIGHT_ENCODER, dtype=torch.float32, use_safetensors=True)
        parts.others[LIGHT_ENCODER] = encoder.requires_grad_(False).eval()
    return build_ic_light_pipeline(parts, scheduler)


def load_base_pipeline(base: Path) -> DiffusionPipeline:
    """The base, on the accelerator if there is one: with its UNet's offset, if it has one, an IC-Light."""
    if not (base / UNET_OFFSET).exists():
        return load_pipeline(base)
    parts = load_parts(base, (UNET_OFFSET,))
    merge_offsets(parts.unet, parts.others.pop(UNET_OFFSET).state_dict())
    return build_ic_light_pipeline(parts, parts.scheduler).to(pick_device())


def load_model(folder: Path, base: Path) -> DiffusionPipeline:
    """What the stage `export` wrote, on the accelerator if there is one: what needs its base with it, or a full model.

    Raises:
        InputError: there is neither, or it was trained on another base.
    """
    if (folder / ADAPTER_FILE).exists():
        return load_adapted(folder, base).to(pick_device())
    if _has_controlnet(folder):
        return load_controlled(folder, base).to(pick_device())
    return load_pipeline(folder / MERGED if (folder / MERGED).exists() else folder)


def needs_base(folder: Path) -> bool:
    """Whether an exported model is a part of one, to be used with its base."""
    return (folder / ADAPTER_FILE).exists() or _has_controlnet(folder)


def _has_controlnet(folder: Path) -> bool:
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else None
    return isinstance(config, dict) and config.get("_class_name") == ControlNetModel.__name__

"""Loads what was trained: a base as it was trained on, and exported models."""

from pathlib import Path

from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json, sha256_json
from sdtrain.ground.headers import read_metadata
from sdtrain.ground.layout import ADAPTER_FILE, MERGED
from sdtrain.ground.manifests import BaseManifest
from sdtrain.models.parts import Parts, load_parts, pick_device, training_scheduler
from sdtrain.models.pipelines import build_pipeline, load_pipeline


def load_base_of(folder: Path, base: Path) -> tuple[Parts, DDPMScheduler]:
    """The base that the `training_config.json` in `folder` names, at its resolution, and its noise schedule.

    Args:
        base: the folder of that base.

    Raises:
        InputError: it is another base.
    """
    config = read_json(folder / "training_config.json")
    is_resolved = (base / "manifest.json").exists()
    if is_resolved and sha256_json(BaseManifest.read(base).files) != config["identity"]["base"]:
        raise InputError(
            f"{folder}: was trained on another base than {base}; run `dvc repro`, or use the base's folder"
        )
    parts = load_parts(base)
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


def load_model(folder: Path, base: Path) -> DiffusionPipeline:
    """What the stage `export` wrote, on the accelerator if there is one: an adapter on its base, or a full model.

    Raises:
        InputError: there is neither, or the adapter was trained on another base.
    """
    if has_adapter(folder):
        return load_adapted(folder, base).to(pick_device())
    return load_pipeline(folder / MERGED if (folder / MERGED).exists() else folder)


def has_adapter(folder: Path) -> bool:
    """Whether an exported model is an adapter, which needs its base."""
    return (folder / ADAPTER_FILE).exists()

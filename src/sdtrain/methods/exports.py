"""The forms in which trained weights are exported, and how stock libraries load each back."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import nn

from sdtrain.models.single_file import save_single_file
from sdtrain.params.schema import ExportParams, Section

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """One form of a model, written."""

    path: Path
    """A file, or a Diffusers folder."""
    kind: str
    """What ModelSpec adds to the architecture's name; empty for a full model."""
    load: Callable[[], DiffusionPipeline]
    """Loads it with stock libraries, in fp32 on the CPU."""
    error: float = 0.0
    """Relative error that its predictions may have in fp32; in 16 bit they may differ more."""
    written: DiffusionPipeline | None = None
    """Of a full model: the weights that must have been written, to the bit."""
    is_original: bool = False
    """Whether it is a file in the key layout of the original Stable Diffusion."""


def export_full(
    pipeline: StableDiffusionPipeline, folder: Path, single_file: Path, params: ExportParams, error: float = 0.0
) -> Iterator[Exported]:
    """Write a full model as a Diffusers folder, and as the `single_file` if the params ask for it.

    Raises:
        InputError: the original layout can't hold the model's structure.
    """
    pipeline = in_half(pipeline) if params.dtype == "fp16" else pipeline
    pipeline.save_pretrained(folder, safe_serialization=True)
    load = partial(type(pipeline).from_pretrained, folder, dtype=torch.float32)
    yield Exported(folder, "", load, error, pipeline)
    if params.single_file:
        save_single_file(pipeline, single_file)
        load = partial(_load_single_file, type(pipeline), single_file, folder)
        yield Exported(single_file, "", load, error, pipeline, is_original=True)


def full_model_bytes(method: Section, params: ExportParams, num_trained: int, num_all: int) -> int:
    """About the size of what `export_full` writes of a model with `num_all` weights."""
    return num_all * DTYPES[params.dtype].itemsize * (2 if params.single_file else 1)


def _load_single_file(kind: type[StableDiffusionPipeline], file: Path, folder: Path) -> StableDiffusionPipeline:
    """Load with the configs, tokenizer and scheduler in `folder`; stock code would look for SD 1.5's on the hub."""
    pipeline = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.float()
    return pipeline


def in_half(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The pipeline in fp16; a copy, because the method's modules go on being used."""
    parts = {
        name: copy.deepcopy(part).half() if isinstance(part, nn.Module) else part
        for name, part in pipeline.components.items()
    }
    return type(pipeline)(**parts, requires_safety_checker=False)

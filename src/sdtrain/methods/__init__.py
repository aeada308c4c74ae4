"""Training methods. `method.py` defines what a method is; each has its own module."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.ground.errors import InputError
from sdtrain.methods import controlnet, finetune, ic_light, lora
from sdtrain.methods.exports import full_model_bytes
from sdtrain.methods.method import Method
from sdtrain.models.parts import Parts
from sdtrain.params.schema import (
    ControlNetParams,
    ExportParams,
    FinetuneParams,
    IcLightParams,
    LoraParams,
    Section,
)


@dataclass(frozen=True)
class Kind:
    """One method: its section of params.yaml, and the function that builds it around a base."""

    params: type[Section]
    build: Callable[[Any, Parts], Method]
    exported_bytes: Callable[[Any, ExportParams, int, int], int] = full_model_bytes
    """About the size of its exports, from its section, the section `export`, and the numbers of trained and all
    weights."""
    first_parts: Callable[[Any], tuple[str, ...]] = lambda params: ()
    """Parts of the base, beyond those of every Stable Diffusion, that its training starts from."""
    found_parts: Callable[[Any], tuple[str, ...]] = lambda params: ()
    """As `first_parts`, those that a base need not have."""
    libraries: tuple[str, ...] = ()
    """Packages, beyond those that every method uses, on whose arithmetic its weights depend."""


METHODS = {
    "finetune": Kind(FinetuneParams, finetune.build),
    "lora": Kind(LoraParams, lora.build, lora.exported_bytes, libraries=("peft",)),
    "controlnet": Kind(ControlNetParams, controlnet.build, controlnet.exported_bytes, controlnet.first_parts),
    "ic_light": Kind(IcLightParams, ic_light.build, ic_light.exported_bytes, found_parts=ic_light.found_parts),
}
"""By `method.name`."""


def build_method(params: Section, parts: Parts) -> Method:
    """Build the method of the section `method` around `parts`, whose weights it changes in place.

    Of a pipeline that the method exported, its own modules are in `parts.others`: it takes these in place of new ones,
    so that what is exported can be compared and evaluated.
    """
    return METHODS[params.name].build(params, parts)


def first_parts(params: Section, base: Path) -> tuple[str, ...]:
    """What the method of the section `method` starts from in the folder `base`, beyond what every base has."""
    kind = METHODS[params.name]
    return *kind.first_parts(params), *(name for name in kind.found_parts(params) if (base / name).exists())


def recorded_method(tree: dict) -> Section:
    """Parse the section `method` that a checkpoint recorded.

    Raises:
        InputError: this version doesn't know the method.
    """
    name = tree.get("name")
    if name not in METHODS:
        raise InputError(f"method.name = {name!r}: unknown to this version of sdtrain, which has {', '.join(METHODS)}")
    return METHODS[name].params.model_validate(tree)

"""Training methods. `method.py` says what one is; each has a module of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdtrain.ground.errors import InputError
from sdtrain.methods import finetune
from sdtrain.methods.method import Method
from sdtrain.models.parts import Parts
from sdtrain.params.schema import FinetuneParams, Section


@dataclass(frozen=True)
class Kind:
    """One method: its section of params.yaml, and what builds it around a base."""

    params: type[Section]
    build: Callable[[Any, Parts], Method]


METHODS = {"finetune": Kind(FinetuneParams, finetune.build)}
"""By `method.name`."""


def build_method(params: Section, parts: Parts) -> Method:
    """The method that a params file's section `method` describes, around `parts`, whose weights it changes in place."""
    return METHODS[params.name].build(params, parts)


def recorded_method(tree: dict) -> Section:
    """The section `method` as a checkpoint recorded it.

    Raises:
        InputError: this version knows no such method.
    """
    name = tree.get("name")
    if name not in METHODS:
        raise InputError(f"method.name = {name!r}: this version of sdtrain has {', '.join(METHODS)}")
    return METHODS[name].params.model_validate(tree)

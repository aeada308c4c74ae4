"""What a rule sees of a params tree, and how it says that a field has no effect.

A field that has no effect because of other fields must have its neutral value. So no given value is silently ignored,
and changing one key of the shipped params.yaml, such as `dataset.source`, doesn't force changes of others.
"""

import json
from collections.abc import Callable
from typing import Any

from sdtrain.params.schema import BUILTIN_CLIP

NEUTRAL = {
    "base.path": "data/builtin",
    "base.unet_offset": "data/offset",
    "dataset.path": "data/images",
    "dataset.split": "train",
    "dataset.image_column": "image",
    "dataset.caption_column": "text",
    "dataset.alpha_background": "#ffffff",
    "dataset.world": "shapes",
    "dataset.num_scenes": 2400,
    "dataset.new_fraction": 0.8,
    "precompute.center_crop": True,
    "train.timestep_sampling": "uniform",
    "train.branch_from": "data/start",
    "train.resume_reset": [],
    "train.ema_schedule": "ramp",
    "train.ema_decay": 0.99,
    "validation.num_inference_steps": 20,
    "validation.guidance_scale": 4.0,
    "export.merged": False,
    "sample.negative_prompt": "",
    "evaluate.features_path": BUILTIN_CLIP,
    "evaluate.num_prompts": 160,
    "evaluate.num_inference_steps": 20,
    "evaluate.guidance_scale": 4.0,
}
"""Values of fields without effect: those of the shipped params.yaml.

Null is neutral, too, for every field that may be null, and the only neutral value of fields not listed here.
"""


class View:
    """A params tree by attribute; only valid fields can be read."""

    class Faulty(Exception):
        """The field is missing or faulty itself."""

    def __init__(self, tree: dict, faulty: set[tuple[str, ...]], place: tuple[str, ...] = ()) -> None:
        self._tree, self._faulty, self._place = tree, faulty, place

    def __getattr__(self, key: str) -> Any:
        place = (*self._place, key)
        if key not in self._tree or place in self._faulty:
            raise View.Faulty
        value = self._tree[key]
        return View(value, self._faulty, place) if isinstance(value, dict) and len(place) == 1 else value

    def ask(self, rule: "Rule") -> str | None:
        """The fault that a rule finds; None if it finds none, or needs a field that is faulty itself."""
        try:
            return rule(self)
        except View.Faulty:
            return None


Rule = Callable[[View], str | None]
"""Finds one fault, or none."""


def source_reads_it(key: str, *sources: str, source_field: str = "source") -> Rule:
    """The field must be neutral unless its section's source is one of `sources`, those that read it."""
    section, field = key.split(".")

    def rule(p: View) -> str | None:
        source, value = getattr(getattr(p, section), source_field), getattr(getattr(p, section), field)
        if source not in sources and not _is_neutral(key, value):
            return (
                f"{key} = {value!r}: {section}.{source_field} = {source!r} doesn't read it; "
                f"set {section}.{source_field}: {sources[0]}, or {key}: {_neutral(key)}"
            )

    return rule


Condition = Callable[[View], tuple[str, str] | None]
"""Returns why a field has no effect, and how to change that; None if it has one."""


def has_effect(key: str, without: Condition, neutral: str | None = None) -> Rule:
    """The field must be neutral if the condition `without` applies; the message suggests `neutral`."""
    section, field = key.split(".")

    def rule(p: View) -> str | None:
        value, found = getattr(getattr(p, section), field), without(p)
        if found and not _is_neutral(key, value):
            cause, way = found
            return f"{key} = {value!r}: has no effect with {cause}; set it to {neutral or _neutral(key)}, or {way}"

    return rule


def _is_neutral(key: str, value: Any) -> bool:
    return value is None or value == NEUTRAL.get(key)


def _neutral(key: str) -> str:
    """The neutral value as YAML writes it."""
    value = NEUTRAL.get(key)
    return value if isinstance(value, str) and value[:1].isalpha() else json.dumps(value)

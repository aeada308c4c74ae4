"""Fixtures on the shipped params, shrunk, and the built-in base model."""

import copy
from pathlib import Path

import pytest
import yaml

from sdtrain.params.load import check_params
from sdtrain.params.schema import BUILTIN_CLIP, Params

ROOT = Path(__file__).resolve().parent.parent
SHRUNK = {
    "dataset": {"num_scenes": 60, "test_fraction": 0.0, "num_workers": 0},
    "precompute": {"batch_size": 16},
    "train": {"max_steps": 4, "batch_size": 8, "micro_batch_size": 8, "lr_warmup_steps": 0, "log_every_n_steps": 1},
    "validation": {"every_n_steps": 2, "num_timesteps": 2, "max_samples": 4, "prompts": []},
    "sample": {
        "prompts": ["a red circle", "a large orange star"], "images_per_prompt": 1, "num_inference_steps": 2,
        "checkpoints": [],
    },
    "evaluate": {"num_timesteps": 2, "num_prompts": 4, "num_inference_steps": 2, "num_bootstrap": 100},
}  # fmt: skip


HINTED = {
    "dataset": {"world": "free_shapes", "new_fraction": 0.0, "condition_columns": {"hint": "outline"}},
    "method": {"name": "controlnet", "start": "unet"},
    "train": {"lr": 1e-3, "caption_dropout": 0.5},
    "sample": {"prompts": [], "num_held_out": 2},
}
"""Changes that make it a ControlNet's."""
IC_LIGHT = {
    "name": "ic_light", "variant": "fc", "light": "words", "light_size": None, "num_light_tokens": None,
    "consistency_weight": 0.0, "phi": None, "consistency_latents": None,
}  # fmt: skip
BY_MAP = {"light": "map", "light_size": [1, 5], "num_light_tokens": 3}


def lit(conditions: str, **method: object) -> dict[str, dict]:
    """Changes that make it IC-Light's, with these conditions, by name, and these settings of the method."""
    world = "lit_by_map" if method.get("light") == "map" else "lit"
    columns = {name: name for name in conditions.split()}
    return {
        "dataset": {"world": world, "new_fraction": 0.0, "condition_columns": columns},
        "method": {**IC_LIGHT, **method},
        "train": {"lr": 1e-3},
        "sample": {"prompts": [], "num_held_out": 2, "images_per_prompt": 1},
    }


WORDS = lit("foreground")
CONSISTENT = lit("foreground light mask", **BY_MAP, consistency_weight=0.1, phi="mlp", consistency_latents="shared")
EVERYTHING_LIT = lit(
    "foreground light mask light_1 relit_1 relit_2",
    **{**BY_MAP, "consistency_weight": 0.1, "phi": "mlp", "consistency_latents": "own"},
)
"""All conditions of the variant fc, so that its runs can share the cache."""
WITH_BACKGROUND = lit("foreground background", variant="fbc")


def merged(first: dict[str, dict], second: dict[str, dict]) -> dict[str, dict]:
    """Changes by section, of which the second win."""
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in first.keys() | second.keys()}


def shrunk_tree(**changes: dict) -> dict:
    """The shipped params.yaml as a tree, shrunk, with changes by section.

    What has no effect after the changes keeps its shipped value, as the rules demand.
    """
    tree = copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))
    shrunk = copy.deepcopy(SHRUNK)
    if changes.get("dataset", {}).get("source", "generated") != "generated":
        del shrunk["dataset"]["num_scenes"]
        if changes.get("evaluate", {}).get("features_path") in (None, BUILTIN_CLIP):  # nothing is drawn
            del shrunk["evaluate"]["num_prompts"], shrunk["evaluate"]["num_inference_steps"]
    if changes.get("validation", {}).get("prompts"):
        shrunk["validation"]["num_inference_steps"] = 2
    for layer in (shrunk, changes):
        for section, fields in layer.items():
            tree[section].update(fields)
    return tree


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def make_params():
    """A function from changes by section to checked Params."""

    def make(**changes: dict) -> Params:
        return check_params(shrunk_tree(**changes))

    return make

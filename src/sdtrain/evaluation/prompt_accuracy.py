"""Prompt accuracy: the share of generated images that show what their prompt says, measured by arithmetic."""

from dataclasses import asdict

import numpy as np
from diffusers import DiffusionPipeline

from sdtrain.data import scenes
from sdtrain.ground import randomness
from sdtrain.ground.statistics import wilson_interval
from sdtrain.models.pipelines import generate
from sdtrain.params.schema import EvaluateParams

_FIELDS = ("color", "shape", "style", "size", "position", "background")


def prompt_accuracy(params: EvaluateParams, seed: int, pipelines: dict[str, DiffusionPipeline]) -> list[dict]:
    """Share of images that show what the prompt says, by field.

    Of prompts with new concepts, colour is counted where the object's colour is new, shape where
    the shape is, style where the style is: what the base has never seen. For known prompts all fields count.
    """
    rows = []
    for kind in ("new", "known"):
        rng = randomness.generator(seed, f"{kind} prompts")
        wanted = [scenes.draw_scene(rng, new=kind == "new", known_background=True) for _ in range(params.num_prompts)]
        for name, pipeline in pipelines.items():
            images = generate(
                pipeline,
                [scenes.caption(scene) for scene in wanted],
                [seed + place for place in range(len(wanted))],
                num_inference_steps=params.num_inference_steps,
                guidance_scale=params.guidance_scale,
                batch_size=params.batch_size,
            )
            shown = [scenes.measure(image) for image in images]
            for field in _FIELDS:
                right = [
                    found is not None and asdict(found)[field] == asdict(scene)[field]
                    for scene, found in zip(wanted, shown, strict=True)
                    if kind == "known" or field not in scenes.NEW or asdict(scene)[field] in scenes.NEW[field]
                ]
                if not right:
                    continue
                low, high = wilson_interval(sum(right), len(right))
                rows.append(
                    {
                        "prompts": kind,
                        "field": field,
                        "model": name,
                        "accuracy": float(np.mean(right)),
                        "ci_low": low,
                        "ci_high": high,
                        "num": len(right),
                    }
                )
    return rows

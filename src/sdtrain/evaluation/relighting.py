"""Relighting, measured: scenes of the lit world, which no data set has, drawn under lights and held against the truth.

Beside the trained model stand its base, a copy of the condition (the foreground as it is given), and the truth after
the VAE's round trip: what no model that draws through this VAE can beat.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from sdtrain.data import lit_scenes
from sdtrain.data.lit_scenes import LitExample
from sdtrain.data.scenes import SIZE_PX
from sdtrain.evaluation import light_measures as measures
from sdtrain.evaluation.drawn_images import DrawnImages
from sdtrain.ground import randomness
from sdtrain.ground.processes import ALONE, Processes
from sdtrain.ground.statistics import bootstrap_interval, wilson_interval
from sdtrain.ground.values import Values
from sdtrain.models.pipelines import Conditions, drawn_px, generate, seen_by
from sdtrain.params.schema import EvaluateParams

_FIRST_SCENE = 2**32
"""Scenes from here on are in no data set."""
_RIGHT_DEG = 45.0
"""A light's direction is right if it is nearer to this light than to any other of the eight, or to one between."""
_TRIPLES_SHARE = 4
"""One of so many scenes is also drawn under a corner light and the two that it joins."""
_SHARES = ("light_direction_accuracy", "color_accuracy")
"""Metrics that are shares of images; the others are means."""


@dataclass(frozen=True)
class Question:
    """A scene to relight."""

    example: LitExample
    light_name: str
    seed: int

    @property
    def light(self) -> np.ndarray:
        """float32 [1, 5, 3]."""
        return lit_scenes.light_map(self.light_name)

    @property
    def truth(self) -> Image.Image:
        """RGB [64, 64]."""
        return lit_scenes.render(self.example.lit, self.light)

    @property
    def foreground(self) -> Image.Image:
        """The object on grey under its other light, RGB [64, 64]."""
        light = lit_scenes.light_map(self.example.foreground_light_name)
        return lit_scenes.foreground(self.example.lit, light, self.example.stripes)


def lit_questions(seed: int, num: int) -> list[Question]:
    """`num` scenes that no data set has, each under one of the eight lights."""
    examples = [lit_scenes.draw_lit(seed, 2 * (_FIRST_SCENE + number)) for number in range(num)]
    return [Question(example, example.light_name, seed + number) for number, example in enumerate(examples)]


def relight(pipeline: DiffusionPipeline, questions: list[Question], by_map: bool, **settings: Any) -> list[Image.Image]:
    """What a pipeline draws, RGB [64, 64]; it gets those of the conditions that it sees.

    Args:
        by_map: the light is told by maps, else by captions.
        settings: `generate`'s others.
    """
    side, seen = drawn_px(pipeline), seen_by(pipeline)
    scenes = [question.example.lit for question in questions]
    conditions: Conditions = {}
    if "foreground" in seen:
        conditions["foreground"] = [_sized(question.foreground, side) for question in questions]
    if "background" in seen:
        walls = [lit_scenes.wall(question.example.lit, question.light) for question in questions]
        conditions["background"] = [_sized(wall, side) for wall in walls]
    if "light" in seen:
        conditions["light"] = [torch.from_numpy(question.light) for question in questions]
    names = [None if by_map else question.light_name for question in questions]
    images = generate(
        pipeline,
        [lit_scenes.caption(lit, name) for lit, name in zip(scenes, names, strict=True)],
        [question.seed for question in questions],
        conditions=conditions,
        **settings,
    )
    return [_sized(image, SIZE_PX) for image in images]


def relighting_accuracy(
    params: EvaluateParams,
    seed: int,
    pipelines: dict[str, DiffusionPipeline],
    by_map: bool,
    values: Values,
    images: DrawnImages,
    processes: Processes = ALONE,
) -> list[dict]:
    """A row for each metric and model (`base`, `trained`, `copy`, `vae`): value, 95 % interval, number.

    The scenes' own values are added to `values`. What the two models draw under one light is added to `images`, beside
    the truth.

    Over scenes under one light: `light_direction_accuracy` (right within 45°), `light_direction_error_deg`,
    `albedo_error` and its `albedo_chroma_error`, `color_accuracy` (the object keeps its named colour),
    `foreground_iou`. Over scenes under a corner light and the two that it joins, with the same noise:
    `linearity_error` of their sum, and `light_sensitivity`, which tells a model that ignores light from one that adds
    it up.
    """
    singles, triples = lit_questions(seed, params.num_prompts), _triples(seed, params.num_prompts)
    flat = [question for triple in triples for question in triple]
    settings = params.model_dump(include={"num_inference_steps", "guidance_scale", "batch_size"})
    settings["processes"] = processes
    drawn = {name: relight(pipeline, singles + flat, by_map, **settings) for name, pipeline in pipelines.items()}
    num = len(singles)
    items = [_item(number) for number in range(num)]
    texts = [lit_scenes.caption(asked.example.lit, None if by_map else asked.light_name) for asked in singles]
    one_each = {name: found[:num] for name, found in drawn.items()}
    images.add(items, texts, [question.truth for question in singles], one_each)
    drawn["copy"] = [question.foreground for question in singles + flat]
    truths = [question.truth for question in singles + flat]
    drawn["vae"] = _round_trip(pipelines["trained"], truths, params.batch_size, processes)
    rows = []
    for name, found in drawn.items():
        one_light, rest = _measure(singles, found[:num]), found[num:]
        two_lights = _measure_triples(triples, [rest[start : start + 3] for start in range(0, len(rest), 3)])
        for measured, questions in ((one_light, singles), (two_lights, [triple[-1] for triple in triples])):
            items = [_item(number) for number in range(len(questions))]
            texts = [lit_scenes.caption(asked.example.lit, asked.light_name) for asked in questions]
            for metric, of_scenes in measured.items():
                values.add(metric, name, of_scenes, items, texts)
        for metric, value, low, high, size in _summary(params, seed, one_light | two_lights):
            rows.append({"metric": metric, "model": name, "value": value, "ci_low": low, "ci_high": high, "num": size})
    return rows


def _item(number: int) -> str:
    return f"scene {number:04}"


def _triples(seed: int, num: int) -> list[list[Question]]:
    """Scenes under two single lights and the corner light that joins them, in this order."""
    corners = [name for name, sides in lit_scenes.NAMED.items() if len(sides) == 2]
    triples = []
    for number, question in enumerate(lit_questions(seed, max(1, num // _TRIPLES_SHARE))):
        corner = corners[number % len(corners)]
        names = [*lit_scenes.NAMED[corner], corner]
        triples.append([Question(question.example, name, question.seed) for name in names])
    return triples


def _measure(questions: list[Question], images: list[Image.Image]) -> dict[str, np.ndarray]:
    """By metric, a value for each image."""
    found: dict[str, list[float]] = {}
    for question, image in zip(questions, images, strict=True):
        lit = question.example.lit
        angle = measures.light_angle_error(image, lit, question.light_name)
        albedo, chroma = measures.albedo_error(image, lit, question.light)
        for metric, value in {
            "light_direction_accuracy": angle < _RIGHT_DEG,
            "light_direction_error_deg": angle,
            "albedo_error": albedo,
            "albedo_chroma_error": chroma,
            "color_accuracy": measures.named_color(image, lit, question.light) == lit.scene.color,
            "foreground_iou": measures.foreground_iou(image, lit),
        }.items():
            found.setdefault(metric, []).append(float(value))
    return {metric: np.array(values) for metric, values in found.items()}


def _measure_triples(triples: list[list[Question]], images: list[list[Image.Image]]) -> dict[str, np.ndarray]:
    scenes = [triple[0].example.lit for triple in triples]
    pairs = list(zip(images, scenes, strict=True))
    return {
        "linearity_error": np.array([measures.linearity_error(*three, lit) for three, lit in pairs]),
        "light_sensitivity": np.array([measures.sensitivity(*three, lit) for three, lit in pairs]),
    }


def _summary(
    params: EvaluateParams, seed: int, values: dict[str, np.ndarray]
) -> Iterator[tuple[str, float, float, float, int]]:
    for metric, found in values.items():
        if metric in _SHARES:
            interval = wilson_interval(int(found.sum()), len(found))
        else:
            rng = randomness.generator(seed, f"{metric} bootstrap")
            interval = bootstrap_interval(found, params.num_bootstrap, rng)
        yield metric, float(found.mean()), *interval, len(found)


def _round_trip(
    pipeline: DiffusionPipeline, images: list[Image.Image], batch_size: int, processes: Processes
) -> list[Image.Image]:
    """Encoded and decoded by the VAE, at the size that the pipeline draws."""
    side, vae = drawn_px(pipeline), pipeline.vae

    @torch.inference_mode()
    def round_trip(batch: list[Image.Image]) -> list[Image.Image]:
        sized = [_sized(image, side) for image in batch]
        latents = vae.encode(pipeline.image_processor.preprocess(sized).to(vae.device)).latent_dist.mode()
        return pipeline.image_processor.postprocess(vae.decode(latents).sample.cpu(), output_type="pil")

    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    return [_sized(image, SIZE_PX) for decoded in processes.map(round_trip, batches) for image in decoded]


def _sized(image: Image.Image, side: int) -> Image.Image:
    """Reduced by area, or enlarged."""
    kind = Image.Resampling.LANCZOS if side > image.width else Image.Resampling.BOX
    return image if image.width == side else image.resize((side, side), kind)

"""Prompt accuracy: the share of generated images that show what their prompt says, measured by arithmetic.

And hint accuracy, for models that see a hint: how well the object lies where the hint says.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from sdtrain.data import scenes
from sdtrain.data.edges import canny_edges
from sdtrain.data.images import square_pixels
from sdtrain.evaluation.drawn_images import DrawnImages
from sdtrain.ground import randomness
from sdtrain.ground.processes import ALONE, Processes
from sdtrain.ground.statistics import bootstrap_interval, wilson_interval
from sdtrain.ground.values import Values
from sdtrain.models.pipelines import Conditions, drawn_px, generate
from sdtrain.params.schema import EvaluateParams

_ATTRIBUTES = ("color", "shape", "style", "size", "position", "background")


@dataclass(frozen=True)
class World:
    """The generated scenes that a model was trained on."""

    free: bool
    """Of any size and at any place, of which captions say nothing."""
    has_new: bool
    """Whether they show concepts that the built-in base has never seen."""
    hint: str | None = None
    """`outline` or `canny` edges, if the trained model sees one of these."""


@dataclass(frozen=True)
class Question:
    """A scene to draw."""

    prompt: str
    scene: scenes.Scene
    placement: scenes.Placement
    seed: int

    def hint(self, kind: str, side: int) -> Image.Image:
        """The model's hint, RGB [side, side]: as the cache has it at that resolution; the image gets its size."""
        if kind == "outline":
            outline = scenes.outline(self.scene, self.placement)
            return outline.resize((side, side), Image.Resampling.BOX).convert("RGB")
        image = scenes.render(self.scene, self.placement)
        pixels = square_pixels(image, side, center_crop=True, seed=self.seed, sample_id="")
        return Image.fromarray(canny_edges(pixels, self.seed, self.prompt)[0]).convert("RGB")


def prompt_accuracy(
    params: EvaluateParams,
    seed: int,
    pipelines: dict[str, DiffusionPipeline],
    world: World,
    values: Values,
    images: DrawnImages,
    processes: Processes = ALONE,
) -> list[dict]:
    """Share of images that show what the prompt says, by attribute; with hints also hint accuracy, `hint`.

    The images' own values are added to `values`. The images themselves, but for those of empty prompts, are added to
    `images`, beside the scenes that were asked for.

    Of prompts with `new` concepts, colour is counted where the object's colour is new, shape where the shape is, style
    where the style is: what the base has never seen. For `known` prompts all that they name counts. `empty`
    prompts leave all to the hint. Hint accuracy is the mean intersection over union of the object's mask with the one
    that the hint outlines.
    """
    kinds = [*(["new"] if world.has_new else []), "known", *(["empty"] if world.hint else [])]
    rows = []
    for kind in kinds:
        questions, drawn = _questions(params, seed, kind, world), {}
        for name, pipeline in pipelines.items():
            conditions: Conditions = {}
            if world.hint and name == "trained":
                conditions["hint"] = [question.hint(world.hint, drawn_px(pipeline)) for question in questions]
            drawn[name] = generate(
                pipeline,
                [question.prompt for question in questions],
                [question.seed for question in questions],
                conditions=conditions,
                num_inference_steps=params.num_inference_steps,
                guidance_scale=params.guidance_scale,
                batch_size=params.batch_size,
                processes=processes,
            )
            for attribute, found in _measured(kind, world, questions, drawn[name]):
                numbers = list(found)
                right, items = np.array(list(found.values())), [_item(kind, number) for number in numbers]
                prompts = [questions[number].prompt for number in numbers]
                values.add(f"{kind}_{attribute}_accuracy", name, right, items, prompts)
                if attribute == "hint":
                    rng = randomness.generator(seed, f"{kind} hint bootstrap")
                    low, high = bootstrap_interval(right, params.num_bootstrap, rng)
                else:
                    low, high = wilson_interval(int(right.sum()), len(right))
                row = {"prompts": kind, "attribute": attribute, "model": name, "accuracy": float(right.mean())}
                rows.append(row | {"ci_low": low, "ci_high": high, "num": len(right)})
        if kind != "empty":
            asked = [(_item(kind, number), question.prompt) for number, question in enumerate(questions)]
            real = [scenes.render(question.scene, question.placement) for question in questions]
            images.add([item for item, _ in asked], [prompt for _, prompt in asked], real, drawn)
    return rows


def _item(kind: str, number: int) -> str:
    return f"{kind} {number:04}"


def _questions(params: EvaluateParams, seed: int, kind: str, world: World) -> list[Question]:
    rng = randomness.generator(seed, f"{kind} prompts")
    wanted = [scenes.draw_scene(rng, new=kind == "new", known_background=True) for _ in range(params.num_prompts)]
    placing = randomness.generator(seed, f"{kind} placements")
    placements = [scenes.place_freely(placing) if world.free else scenes.place(scene, placing) for scene in wanted]
    omit = ("size", "position") if world.free else ()
    prompts = ["" if kind == "empty" else scenes.caption(scene, omit) for scene in wanted]
    return [
        Question(prompt, scene, placement, seed + number)
        for number, (prompt, scene, placement) in enumerate(zip(prompts, wanted, placements, strict=True))
    ]


def _measured(
    kind: str, world: World, questions: list[Question], images: list[Image.Image]
) -> Iterator[tuple[str, dict[int, float]]]:
    """By attribute, the values of the images that count, by their number."""
    shown = [scenes.measure(image) for image in images]
    for attribute in _ATTRIBUTES:
        if kind == "empty" or (world.free and attribute in ("size", "position")):
            continue
        right = {
            number: float(found is not None and asdict(found)[attribute] == asdict(asked.scene)[attribute])
            for number, (asked, found) in enumerate(zip(questions, shown, strict=True))
            if kind == "known" or attribute not in scenes.NEW or asdict(asked.scene)[attribute] in scenes.NEW[attribute]
        }
        if right:
            yield attribute, right
    if world.hint:
        pairs = enumerate(zip(questions, images, strict=True))
        yield "hint", {number: _overlap(asked, image) for number, (asked, image) in pairs}


def _overlap(asked: Question, image: Image.Image) -> float:
    """Intersection over union of the drawn object's mask with the one asked for; 0 if there is no object."""
    mask = scenes.object_mask(image)
    return 0.0 if mask is None else scenes.iou(mask, scenes.coverage(asked.scene, asked.placement))

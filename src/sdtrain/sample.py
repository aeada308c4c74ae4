"""Images to compare: what base, trained model and further checkpoints draw with the same prompts and the same noise."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from sdtrain.data import lit_scenes
from sdtrain.data.shards import LatentShards, held_out_pictures
from sdtrain.evaluation.relighting import lit_questions, relight
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import new_folder, read_json
from sdtrain.ground.grid import Columns, draw_grid
from sdtrain.ground.light import linear_to_srgb
from sdtrain.ground.manifests import DatasetManifest, encoders_fingerprint
from sdtrain.ground.processes import ALONE, Processes
from sdtrain.ground.samples import GRID, IMAGES, DrawnImage, GivenImage, Samples, scale_text
from sdtrain.methods.checkpoints import is_checkpoint, load_checkpoint
from sdtrain.models.parts import pick_device
from sdtrain.models.pipelines import Conditions, drawn_px, generate, seen_by
from sdtrain.models.trained import load_base_pipeline, load_model
from sdtrain.params.schema import SampleParams

_LIGHTS = ("left", "right", "top", "bottom")

Models = Iterator[tuple[str, DiffusionPipeline]]
"""By name, each loaded when it is reached: `base`, `trained`, then checkpoints."""
Pictures = Iterator[tuple[DrawnImage | GivenImage, Image.Image]]
"""In the order of a grid's columns."""


@dataclass(frozen=True)
class SampleFiles:
    """Where samples come from and go to."""

    base: Path
    checkpoints: Path
    model: Path
    dataset: Path
    latents: Path
    out: Path
    """`ground/samples.py` describes it."""


def draw_samples(params: SampleParams, seed: int, files: SampleFiles, processes: Processes = ALONE) -> None:
    """Draw images of all models at all guidance scales, each by itself and in grids with a row per prompt.

    With `num_held_out`, a row per held-out image: its conditions, which the trained model sees, stand first. Of the lit
    world, a row per scene under four lights, the trained model's image beside the truth.

    Args:
        processes: who share the drawing; the main one writes.

    Raises:
        InputError: a checkpoint isn't there, or a model was trained on another base.
    """
    chosen = _choose_checkpoints(params.checkpoints, files)
    trained = load_model(files.model, files.base)
    models = _models(trained, chosen, files.base)
    data = DatasetManifest.read(files.dataset)
    if params.num_held_out is None:
        pictures = _prompted(params, seed, models, processes)
    elif data.is_lit:
        pictures = _relit(params, seed, models, data.world == "lit_by_map", processes)
    else:
        shards = LatentShards(files.latents, "validation", encoders_fingerprint(files.base))
        pictures = _held_out(params, seed, models, trained, shards, processes)
    if not processes.is_main:
        deque(pictures, maxlen=0)
        return
    with new_folder(files.out) as folder:
        (folder / IMAGES).mkdir()
        found = []
        for entry, image in pictures:
            image.save(folder / entry.file)
            found.append((entry, image))
        drawn = [entry for entry, _ in found if isinstance(entry, DrawnImage)]
        samples = Samples(drawn=drawn, given=[entry for entry, _ in found if isinstance(entry, GivenImage)])
        samples.write(folder)
        for number, scale in enumerate(params.guidance_scales):
            grid = draw_grid(_columns(found, scale, samples.models), samples.texts)
            grid.save(folder / (f"grid-guidance-{scale_text(scale)}.png" if number else GRID))


def _choose_checkpoints(names: list[str], files: SampleFiles) -> dict[str, Path]:
    """The listed checkpoints without those that are the exported model, or one listed before."""
    exported = read_json(files.model / "training_config.json")
    known = {(exported["fingerprint"], exported["step"], exported["export"]["weights"]): "trained"}
    chosen: dict[str, Path] = {}
    for name in names:
        folder = files.checkpoints / name
        if not is_checkpoint(folder):
            there = sorted(path.name for path in files.checkpoints.glob("*") if is_checkpoint(path))
            raise InputError(
                f"sample.checkpoints: {files.checkpoints} has no {name!r}, but {', '.join(there) or 'none'}; list those"
            )
        config, weights = read_json(folder / "training_config.json"), "ema" if (folder / "ema").exists() else "raw"
        twin = known.setdefault((config["fingerprint"], config["step"], weights), name)
        if twin == name:
            chosen[name] = folder
        else:
            print(f"{name} isn't drawn: it is {twin}, {weights} weights of step {config['step']}")
    return chosen


def _models(trained: DiffusionPipeline, checkpoints: dict[str, Path], base: Path) -> Models:
    """At most one beside the trained one is on the accelerator."""
    base_pipeline = load_base_pipeline(base)
    yield "base", base_pipeline
    base_pipeline.to("cpu")
    yield "trained", trained
    for name, folder in checkpoints.items():
        method, scheduler, _ = load_checkpoint(folder, None, base)
        pipeline = method.pipeline(scheduler).to(pick_device())
        yield name, pipeline
        pipeline.to("cpu")


def _prompted(params: SampleParams, seed: int, models: Models, processes: Processes) -> Pictures:
    for name, pipeline in models:
        yield from _draw(params, seed, name, pipeline, params.prompts, [None] * len(params.prompts), {}, processes)


def _held_out(
    params: SampleParams,
    seed: int,
    models: Models,
    trained: DiffusionPipeline,
    shards: LatentShards,
    processes: Processes,
) -> Pictures:
    """Held-out images' conditions, of a relit object the held-out image itself, and what models draw under captions."""
    seen = [name for name in shards.manifest.conditions if name in seen_by(trained)]
    captions, conditions = held_out_pictures(shards, [*seen, "mean"], params.num_held_out)
    ids = shards.ids
    items = [ids[row] for row in shards.chosen(params.num_held_out)]
    truths = conditions.pop("mean")
    for name, values in {**conditions, **({"truth": truths} if "foreground" in seen else {})}.items():
        for row, (value, text, item) in enumerate(zip(values, captions, items, strict=True)):
            yield _given(name, row, text, item), _shown(name, value, trained)
    for name, pipeline in models:
        takes = {key: values for key, values in conditions.items() if key in seen_by(pipeline)}
        yield from _draw(params, seed, name, pipeline, captions, items, takes, processes)


def _relit(params: SampleParams, seed: int, models: Models, by_map: bool, processes: Processes) -> Pictures:
    """Scenes of the lit world that are in no data set."""
    questions = lit_questions(seed, params.num_held_out)
    texts = [lit_scenes.caption(question.example.lit, None) for question in questions]
    items = [f"scene {row:04}" for row in range(len(questions))]
    settings = params.model_dump(include={"num_inference_steps", "batch_size", "negative_prompt"})
    settings["processes"] = processes
    for row, (question, text, item) in enumerate(zip(questions, texts, items, strict=True)):
        yield _given("foreground", row, text, item), question.foreground
    for name, pipeline in models:
        for light in _LIGHTS[:1] if name == "base" else _LIGHTS:
            asked = [replace(question, light_name=light) for question in questions]
            if name == "trained":
                for row, (question, text, item) in enumerate(zip(asked, texts, items, strict=True)):
                    yield _given("truth", row, text, item, light), question.truth
            for scale in params.guidance_scales:
                images = relight(pipeline, asked, by_map, guidance_scale=scale, **settings)
                for row, (question, image) in enumerate(zip(asked, images, strict=True)):
                    yield _drawn(name, scale, question.seed, row, texts[row], items[row], light), image


def _shown(name: str, value: Image.Image | Tensor, pipeline: DiffusionPipeline) -> Image.Image:
    """A condition as an image: latents decoded; of a light map the part that a screen can show."""
    if isinstance(value, Image.Image):
        return value
    if name == "light":
        visible = Image.fromarray((255 * linear_to_srgb(value.numpy().clip(0, 1))).round().astype(np.uint8))
        return visible.resize((drawn_px(pipeline),) * 2, Image.Resampling.NEAREST)
    with torch.inference_mode():
        decoded = pipeline.vae.decode(value[None].to(pipeline.device)).sample.cpu()
    return pipeline.image_processor.postprocess(decoded, output_type="pil")[0]


def _draw(
    params: SampleParams,
    seed: int,
    name: str,
    pipeline: DiffusionPipeline,
    texts: list[str],
    items: list[str | None],
    conditions: Conditions,
    processes: Processes,
) -> Pictures:
    """One model's images at every guidance scale."""
    num = params.images_per_prompt
    for scale in params.guidance_scales:
        images = generate(
            pipeline,
            [text for text in texts for _ in range(num)],
            [seed + place for _ in texts for place in range(num)],
            conditions={key: [value for value in given for _ in range(num)] for key, given in conditions.items()},
            negative_prompt=params.negative_prompt,
            num_inference_steps=params.num_inference_steps,
            guidance_scale=scale,
            batch_size=params.batch_size,
            processes=processes,
        )
        for place, image in enumerate(images):
            row = place // num
            yield _drawn(name, scale, seed + place % num, row, texts[row], items[row]), image


def _drawn(
    model: str, scale: float, seed: int, row: int, text: str, item: str | None, light: str | None = None
) -> DrawnImage:
    stem = "-".join([f"{row:02}", model, *([light] if light else []), f"guidance{scale_text(scale)}", f"seed{seed}"])
    return DrawnImage(
        file=f"{IMAGES}/{stem}.png", prompt=row, text=text, item=item, light=light,
        model=model, seed=seed, guidance_scale=scale,
    )  # fmt: skip


def _given(name: str, row: int, text: str, item: str, light: str | None = None) -> GivenImage:
    stem = "-".join([f"{row:02}", name, *([light] if light else [])])
    return GivenImage(file=f"{IMAGES}/{stem}.png", prompt=row, text=text, item=item, light=light, name=name)


def _columns(pictures: list[tuple[DrawnImage | GivenImage, Image.Image]], scale: float, models: list[str]) -> Columns:
    """A grid's columns at one guidance scale."""
    rows: dict[str, dict[int, list[Image.Image]]] = {}
    for entry, image in pictures:
        if isinstance(entry, GivenImage) or entry.guidance_scale == scale:
            rows.setdefault(_head(entry, models), {}).setdefault(entry.prompt, []).append(image)
    return {head: list(by_row.values()) for head, by_row in rows.items()}


def _head(entry: DrawnImage | GivenImage, models: list[str]) -> str:
    """The column's: a model's or a condition's; under a light the truth and all models but the base share one."""
    name = entry.model if isinstance(entry, DrawnImage) else entry.name
    if entry.light is None:
        return "held out" if name == "truth" else name
    if name == "base":
        return f"base, {entry.light} light"
    return f"{entry.light} light: {', '.join(['truth', *models[1:]])}"

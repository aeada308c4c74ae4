"""Metrics on held-out data: losses of base and trained, and how right, how real and how new what they draw is."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from diffusers import DiffusionPipeline

from sdtrain.data.shards import LatentShards
from sdtrain.evaluation.drawn_images import DrawnImages, draw_held_out
from sdtrain.evaluation.held_out import HeldOut
from sdtrain.evaluation.image_comparison import Comparison, compare_images, load_judge
from sdtrain.evaluation.loss_metrics import Denoiser, loss_metrics
from sdtrain.evaluation.memorization import memorization_metrics
from sdtrain.evaluation.pictures import write_neighbors, write_worst
from sdtrain.evaluation.prompt_accuracy import World, prompt_accuracy
from sdtrain.evaluation.relighting import relighting_accuracy
from sdtrain.ground.files import new_folder, read_json, write_json, write_text
from sdtrain.ground.manifests import DatasetManifest, LatentsManifest, encoders_fingerprint
from sdtrain.ground.processes import ALONE, Processes
from sdtrain.ground.values import Values
from sdtrain.methods import build_method, first_parts
from sdtrain.methods.checkpoints import is_checkpoint, load_checkpoint, read_checkpoint
from sdtrain.models.ic_light import IcLightPipeline
from sdtrain.models.parts import load_others, parts_of, pick_device
from sdtrain.models.trained import load_base_pipeline, load_model
from sdtrain.params.schema import BUILTIN_CLIP, EvaluateParams, Section

_FEW_IMAGES = 10
"""Over fewer a bootstrap interval that should hold the mean in 95 % of cases does so in 90 % at most; over 1 never."""


@dataclass(frozen=True)
class EvaluateFiles:
    """Where an evaluation reads and writes."""

    base: Path
    checkpoints: Path
    model: Path
    dataset: Path
    latents: Path
    features: Path
    """The image encoder."""
    metrics: Path
    """Flat numbers."""
    image_sets: Path
    """Flat numbers of what the image encoder says; without one there are none."""
    values: Path
    """The values behind them, image by image: `ground/values.py`."""
    loss_table: Path
    """The held-out loss by timestep."""
    accuracy_table: Path
    """Of generated scenes, the accuracy by kind of prompt and attribute; of others no rows."""
    relighting_table: Path
    """Of lit scenes, the metrics of relighting; of others no rows."""
    pictures: Path
    """Images to look at: `evaluation/pictures.py` describes them."""


def evaluate_model(
    params: EvaluateParams, method: Section, seed: int, files: EvaluateFiles, processes: Processes = ALONE
) -> None:
    """Compare a model with its base.

    Args:
        method: the section of params.yaml that the model was trained with.
        processes: who share the work; the main one writes.

    Raises:
        InputError: the image encoder can't be loaded, or is the base's own.
    """
    base = files.base
    pipelines = {"base": load_base_pipeline(base), "trained": load_model(files.model, base)}
    judge = load_judge(files.features, pipelines["base"].text_encoder)  # before hours of drawing
    split = LatentsManifest.read(files.latents).reported_split
    shards = LatentShards(files.latents, split, encoders_fingerprint(base))
    data = DatasetManifest.read(files.dataset)
    world, accuracies, relit, values, images = _world(data, shards.manifest), [], [], Values(), DrawnImages()
    # Before a method changes the pipelines' parts.
    if data.is_lit:
        relit = relighting_accuracy(params, seed, pipelines, data.world == "lit_by_map", values, images, processes)
    elif world:
        accuracies = prompt_accuracy(params, seed, pipelines, world, values, images, processes)
    elif judge and _knows_own_images(params):
        draw_held_out(params, seed, pipelines, shards, files.dataset, images, processes)
    models, pipeline = _denoisers(method, pipelines, base, shards.manifest, processes), pipelines["base"]
    ask = partial(
        HeldOut,
        scaling_factor=pipeline.vae.config.scaling_factor,
        num_train_timesteps=pipeline.scheduler.config.num_train_timesteps,
        num_timesteps=params.num_timesteps,
        batch_size=params.batch_size,
    )
    held_out = ask(shards, max_samples=params.max_samples)
    seen = ask(LatentShards(files.latents, "train", encoders_fingerprint(base)), max_samples=held_out.num_samples)
    checkpoints = _checkpoints(files, models, processes)
    numbers, losses = loss_metrics(params, seed, models, checkpoints, held_out, pipeline.tokenizer, values)
    numbers |= memorization_metrics(models, held_out, losses, seen, pipeline.tokenizer, values)
    table = pd.DataFrame({"timestep": held_out.timesteps, **{name: losses[name].mean(axis=0) for name in models}})
    numbers |= {f"{row['prompts']}_{row['attribute']}_accuracy_{row['model']}": row["accuracy"] for row in accuracies}
    numbers |= _relighting_numbers(relit)
    if accuracies or relit:
        numbers["num_prompts"] = params.num_prompts
    compared = Comparison({})
    if judge and images.items:
        compared = compare_images(params, seed, judge, images, seen.shards, files.dataset, values, processes)
    if not processes.is_main:
        return
    with new_folder(files.pictures) as folder:
        of_images = {name: found.mean(axis=1) for name, found in losses.items()}
        write_worst(folder, shards, files.dataset, held_out.ids, held_out.captions(pipeline.tokenizer), of_images)
        write_neighbors(folder, compared, images, seen.shards, files.dataset)
    for path, rows, first in (
        (files.accuracy_table, accuracies, ["prompts", "attribute", "model", "accuracy"]),
        (files.relighting_table, relit, ["metric", "model", "value"]),
    ):
        columns = [*first, "ci_low", "ci_high", "num"]
        write_text(path, pd.DataFrame(rows, columns=columns).to_csv(index=False, lineterminator="\n"))
    write_text(files.loss_table, table.to_csv(index=False, lineterminator="\n"))
    values.write(files.values)
    write_json(files.metrics, numbers)
    write_json(files.image_sets, compared.numbers)
    num = held_out.num_samples
    print(f"held-out images: {num} of the {split} split")
    if num < _FEW_IMAGES:
        key = f"dataset.{split}_fraction" if num == len(shards) else "evaluate.max_samples"
        print(f"WARNING: intervals over {num} held-out images are too narrow; raise {key}", file=sys.stderr)
    for name, value in (numbers | compared.numbers).items():
        print(f"{name:50} {value:.5g}")


def _knows_own_images(params: EvaluateParams) -> bool:
    """Whether the image encoder knows other images than generated ones; if not, that is said."""
    if params.features == "local" and params.features_path == BUILTIN_CLIP:
        print(f"no images are drawn: {BUILTIN_CLIP} knows generated scenes only; see evaluate.features for your own")
        return False
    return True


def _relighting_numbers(rows: list[dict]) -> dict[str, float]:
    """Every model's value, and the trained one's interval and number."""
    numbers = {f"{row['metric']}_{row['model']}": row["value"] for row in rows}
    for row in rows:
        if row["model"] == "trained":
            numbers |= {f"{row['metric']}_trained_{key}": row[key] for key in ("ci_low", "ci_high", "num")}
    return numbers


def _world(dataset: DatasetManifest, latents: LatentsManifest) -> World | None:
    """The generated scenes of shapes; None if the images are others."""
    if dataset.world is None or dataset.is_lit:
        return None
    hint = "outline" if "hint" in dataset.conditions else latents.params["derived_conditions"].get("hint")
    has_new = dataset.source.get("new_fraction", 1) > 0
    return World(free=dataset.world == "free_shapes", has_new=has_new, hint=hint)


def _denoisers(
    params: Section,
    pipelines: dict[str, DiffusionPipeline],
    base: Path,
    latents: LatentsManifest,
    processes: Processes,
) -> dict[str, Denoiser]:
    """The method around each pipeline's parts; the base counts as the method before its first step."""
    built = {}
    for name, pipeline in pipelines.items():
        parts = parts_of(pipeline)
        if name == "base" and not isinstance(pipeline, IcLightPipeline):  # which has what the method starts from
            parts.others |= load_others(base, first_parts(params, base))
            parts.set_resolution(latents.params["resolution"])
        method = build_method(params, parts)
        built[name] = Denoiser(method, parts.scheduler, (*parts.modules(), method.trained), processes)
        built[name].to(pipeline.device)
    return built


def _checkpoints(
    files: EvaluateFiles, models: dict[str, Denoiser], processes: Processes
) -> Iterator[tuple[list[str], Denoiser]]:
    """All kept checkpoints' weights with their names, e.g. `best_ema`, one at a time, in the place of the base.

    What has several names, because the last step was the best, comes once; as the trained model itself if that has just
    these weights.
    """
    names: dict[tuple, list[str]] = {}
    for folder in sorted(path for path in files.checkpoints.iterdir() if is_checkpoint(path)):
        config = read_checkpoint(folder)
        for weights in ("raw", "ema"):
            if (folder / weights).exists():
                key = (config["fingerprint"], config["step"], weights)
                names.setdefault(key, []).append(f"{folder.name.replace('-', '_')}_{weights}")
    if not names:
        return
    exported = read_json(files.model / "training_config.json")
    twin = (exported["fingerprint"], exported["step"], exported["export"]["weights"])
    if exported["export"]["dtype"] == "fp32" and twin in names:
        yield names.pop(twin), models["trained"]
    device, method = pick_device(), None
    models["base"].to(torch.device("cpu"))  # so that no more than two models are on the accelerator
    for same in names.values():
        folder, _, weights = same[0].rpartition("_")
        checkpoint = files.checkpoints / folder.replace("_", "-")
        if method is None:
            method, scheduler, _ = load_checkpoint(checkpoint, weights, files.base)
            method.pipeline(scheduler).to(device)
        else:
            method.load(checkpoint / weights)
        yield same, Denoiser(method, scheduler, (method.trained,), processes)
    del method
    models["base"].to(device)

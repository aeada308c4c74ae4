"""Metrics on held-out data: loss and condition use of base and trained, and how right generated scenes are drawn."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from diffusers import DiffusionPipeline

from sdtrain.data.shards import LatentShards
from sdtrain.evaluation.condition_use import unused
from sdtrain.evaluation.held_out import HeldOut, conditions_of
from sdtrain.evaluation.prompt_accuracy import World, prompt_accuracy
from sdtrain.evaluation.relighting import relighting_accuracy
from sdtrain.ground import randomness
from sdtrain.ground.files import write_json, write_text
from sdtrain.ground.manifests import DatasetManifest, LatentsManifest, encoders_fingerprint
from sdtrain.ground.statistics import bootstrap_interval
from sdtrain.ground.values import Values
from sdtrain.methods import build_method, first_parts
from sdtrain.methods.method import Method
from sdtrain.models.ic_light import IcLightPipeline
from sdtrain.models.parts import load_others, parts_of
from sdtrain.models.trained import load_base_pipeline, load_model
from sdtrain.params.schema import EvaluateParams, Section


@dataclass(frozen=True)
class EvaluateFiles:
    """Where an evaluation reads and writes."""

    base: Path
    model: Path
    dataset: Path
    latents: Path
    metrics: Path
    """Flat numbers."""
    values: Path
    """The values behind them, image by image: `ground/values.py`."""
    loss_table: Path
    """The held-out loss by timestep."""
    accuracy_table: Path
    """Of generated scenes, the accuracy by kind of prompt and field; of others no rows."""
    relighting_table: Path
    """Of lit scenes, the metrics of relighting; of others no rows."""


def evaluate_model(params: EvaluateParams, method: Section, seed: int, files: EvaluateFiles) -> None:
    """Compare a model with its base.

    Args:
        method: the section of params.yaml that the model was trained with.
    """
    base = files.base
    pipelines = {"base": load_base_pipeline(base), "trained": load_model(files.model, base)}
    shards = LatentShards(files.latents, "validation", encoders_fingerprint(base))
    data = DatasetManifest.read(files.dataset)
    world, accuracies, relit, values = _world(data, shards.manifest), [], [], Values()
    # Before a method changes the pipelines' parts.
    if data.is_lit:
        relit = relighting_accuracy(params, seed, pipelines, data.world == "lit_by_map", values)
    elif world:
        accuracies = prompt_accuracy(params, seed, pipelines, world, values)
    models = _build(method, pipelines, base, shards.manifest)
    numbers, table = _held_out_loss(params, seed, models, pipelines, shards, values)
    numbers |= {f"{row['prompts']}_{row['field']}_accuracy_{row['model']}": row["accuracy"] for row in accuracies}
    numbers |= _relighting_numbers(relit)
    if accuracies or relit:
        numbers["num_prompts"] = params.num_prompts
    for path, rows, first in (
        (files.accuracy_table, accuracies, ["prompts", "field", "model", "accuracy"]),
        (files.relighting_table, relit, ["metric", "model", "value"]),
    ):
        columns = [*first, "ci_low", "ci_high", "num"]
        write_text(path, pd.DataFrame(rows, columns=columns).to_csv(index=False, lineterminator="\n"))
    write_text(files.loss_table, table.to_csv(index=False, lineterminator="\n"))
    values.write(files.values)
    write_json(files.metrics, numbers)
    for name, value in numbers.items():
        print(f"{name:40} {value:.5g}")


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


def _build(
    params: Section, pipelines: dict[str, DiffusionPipeline], base: Path, latents: LatentsManifest
) -> dict[str, Method]:
    """The method around each pipeline's parts; the base counts as the method before its first step."""
    built = {}
    for name, pipeline in pipelines.items():
        parts = parts_of(pipeline)
        if name == "base" and not isinstance(pipeline, IcLightPipeline):  # which has what the method starts from
            parts.others |= load_others(base, first_parts(params, base))
            parts.set_resolution(latents.params["resolution"])
        built[name] = build_method(params, parts)
        for module in (*parts.modules(), built[name].trained):
            module.to(pipeline.device)
    return built


def _held_out_loss(
    params: EvaluateParams,
    seed: int,
    models: dict[str, Method],
    pipelines: dict[str, DiffusionPipeline],
    shards: LatentShards,
    values: Values,
) -> tuple[dict, pd.DataFrame]:
    """The held-out loss of both models and their condition-use gaps, as numbers; the loss by timestep as a table.

    The images' own values are added to `values`.
    """
    base = pipelines["base"]
    held_out = HeldOut(
        shards,
        base.vae.config.scaling_factor,
        num_train_timesteps=base.scheduler.config.num_train_timesteps,
        num_timesteps=params.num_timesteps,
        max_samples=params.max_samples,
        batch_size=params.batch_size,
    )

    def losses_of(swapped: str | None = None) -> dict[str, np.ndarray]:
        """By model, float64 [images, timesteps]."""
        return {
            name: held_out.losses(method, pipelines[name].scheduler, swapped=swapped).double().cpu().numpy()
            for name, method in models.items()
        }

    shards.check_columns(models["trained"].columns)
    losses = losses_of()
    of_images = held_out.ids, held_out.captions, held_out.timesteps.tolist()
    for name, found in losses.items():
        values.add("held_out_loss", name, found, *of_images)
    gain = (losses["base"] - losses["trained"]).mean(axis=1)
    low, high = bootstrap_interval(gain, params.num_bootstrap, randomness.generator(seed, "bootstrap"))
    numbers = {
        "held_out_loss_base": losses["base"].mean(),
        "held_out_loss_trained": losses["trained"].mean(),
        "held_out_loss_gain": gain.mean(),
        "held_out_loss_gain_ci_low": low,
        "held_out_loss_gain_ci_high": high,
        "num_held_out": held_out.num_samples,
    }
    for condition in conditions_of(models["trained"]):
        gap, base_share = None, None
        if held_out.differs(condition):
            gaps = {name: swapped - losses[name] for name, swapped in losses_of(condition).items()}
            gap, base_share = gaps["trained"].mean(), gaps["base"].mean() / losses["base"].mean()
            numbers |= _gap_numbers(params, seed, condition, gaps)
            for name, found in gaps.items():
                values.add(f"{condition}_gap", name, found, *of_images)
        if sentence := unused(condition, gap, losses["trained"].mean(), base_share):
            print(f"WARNING: {sentence}", file=sys.stderr)
    by_timestep = {name: values.mean(axis=0) for name, values in losses.items()}
    table = pd.DataFrame({"timestep": held_out.timesteps.numpy(), **by_timestep})
    return {name: int(n) if name == "num_held_out" else float(n) for name, n in numbers.items()}, table


def _gap_numbers(params: EvaluateParams, seed: int, condition: str, gaps: dict[str, np.ndarray]) -> dict[str, float]:
    """The condition-use gap of both models, and the trained one's 95 % interval over images."""
    rng = randomness.generator(seed, f"{condition} gap bootstrap")
    low, high = bootstrap_interval(gaps["trained"].mean(axis=1), params.num_bootstrap, rng)
    numbers = {f"{condition}_gap_{name}": values.mean() for name, values in gaps.items()}
    return numbers | {f"{condition}_gap_trained_ci_low": low, f"{condition}_gap_trained_ci_high": high}

"""Metrics on held-out data: loss and condition use of base and trained, and how right generated scenes are drawn."""

import sys
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
from sdtrain.methods import build_method, first_parts
from sdtrain.methods.method import Method
from sdtrain.models.ic_light import IcLightPipeline
from sdtrain.models.parts import load_others, parts_of
from sdtrain.models.trained import load_base_pipeline, load_model
from sdtrain.params.schema import EvaluateParams, Section


def evaluate_model(
    params: EvaluateParams,
    method: Section,
    seed: int,
    base: Path,
    model: Path,
    dataset: Path,
    latents: Path,
    metrics: Path,
    loss_table: Path,
    accuracy_table: Path,
    relighting_table: Path,
) -> None:
    """Compare the `model` with its `base`.

    `method` is the section of params.yaml that the model was trained with.

    Writes flat numbers to `metrics`; the held-out loss by timestep to `loss_table`; and for generated scenes the
    accuracy by kind of prompt and field to `accuracy_table`, or of lit scenes the metrics of relighting to
    `relighting_table` (else tables without rows).
    """
    pipelines = {"base": load_base_pipeline(base), "trained": load_model(model, base)}
    shards = LatentShards(latents, "validation", encoders_fingerprint(base))
    data = DatasetManifest.read(dataset)
    world, accuracies, relit = _world(data, shards.manifest), [], []
    # Before a method changes the pipelines' parts.
    if data.is_lit:
        relit = relighting_accuracy(params, seed, pipelines, by_map=data.world == "lit_by_map")
    elif world:
        accuracies = prompt_accuracy(params, seed, pipelines, world)
    numbers, table = _held_out_loss(params, seed, _build(method, pipelines, base, shards.manifest), pipelines, shards)
    numbers |= {f"{row['prompts']}_{row['field']}_accuracy_{row['model']}": row["accuracy"] for row in accuracies}
    numbers |= _relighting_numbers(relit)
    if accuracies or relit:
        numbers["num_prompts"] = params.num_prompts
    for path, rows, first in (
        (accuracy_table, accuracies, ["prompts", "field", "model", "accuracy"]),
        (relighting_table, relit, ["metric", "model", "value"]),
    ):
        columns = [*first, "ci_low", "ci_high", "num"]
        write_text(path, pd.DataFrame(rows, columns=columns).to_csv(index=False, lineterminator="\n"))
    write_text(loss_table, table.to_csv(index=False, lineterminator="\n"))
    write_json(metrics, numbers)
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
) -> tuple[dict, pd.DataFrame]:
    """The held-out loss of both models and their condition-use gaps, as numbers; the loss by timestep as a table."""
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

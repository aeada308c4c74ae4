"""Metrics on held-out data: loss and condition use of base and trained, and on generated scenes prompt accuracy."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from diffusers import DiffusionPipeline

from sdtrain.data.shards import LatentShards
from sdtrain.evaluation.condition_use import unused
from sdtrain.evaluation.held_out import HeldOut, conditions_of
from sdtrain.evaluation.prompt_accuracy import World, prompt_accuracy
from sdtrain.ground import randomness
from sdtrain.ground.files import write_json, write_text
from sdtrain.ground.manifests import DatasetManifest, LatentsManifest, encoders_fingerprint
from sdtrain.ground.statistics import bootstrap_interval
from sdtrain.methods import build_method, first_parts
from sdtrain.methods.method import Method
from sdtrain.models.parts import load_others, parts_of
from sdtrain.models.pipelines import load_pipeline
from sdtrain.models.trained import load_model
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
) -> None:
    """Compare the `model` with its `base`.

    `method` is the section of params.yaml that the model was trained with.

    Writes flat numbers to `metrics`; the held-out loss by timestep to `loss_table`; and for generated
    scenes the accuracy by kind of prompt and field to `accuracy_table` (else a table without rows).
    """
    pipelines = {"base": load_pipeline(base), "trained": load_model(model, base)}
    shards = LatentShards(latents, "validation", encoders_fingerprint(base))
    world = _world(DatasetManifest.read(dataset), shards.manifest)
    # Before a method changes the pipelines' parts.
    rows = prompt_accuracy(params, seed, pipelines, world) if world else []
    numbers, table = _held_out_loss(params, seed, _build(method, pipelines, base, shards.manifest), pipelines, shards)
    write_text(loss_table, table.to_csv(index=False, lineterminator="\n"))
    if world:
        numbers |= {f"{row['prompts']}_{row['field']}_accuracy_{row['model']}": row["accuracy"] for row in rows}
        numbers["num_prompts"] = params.num_prompts
    columns = ["prompts", "field", "model", "accuracy", "ci_low", "ci_high", "num"]
    write_text(accuracy_table, pd.DataFrame(rows, columns=columns).to_csv(index=False, lineterminator="\n"))
    write_json(metrics, numbers)
    for name, value in numbers.items():
        print(f"{name:40} {value:.5g}")


def _world(dataset: DatasetManifest, latents: LatentsManifest) -> World | None:
    """The generated scenes; None if the images are others, which arithmetic can't measure."""
    if "generated" not in dataset.source:
        return None
    hint = "outline" if "hint" in dataset.conditions else latents.params["derived_conditions"].get("hint")
    has_new = dataset.source.get("new_fraction", 1) > 0
    return World(free=dataset.source.get("world") == "free_shapes", has_new=has_new, hint=hint)


def _build(
    params: Section, pipelines: dict[str, DiffusionPipeline], base: Path, latents: LatentsManifest
) -> dict[str, Method]:
    """The method around each pipeline's parts; the base counts as the method before its first step."""
    built = {}
    for name, pipeline in pipelines.items():
        parts = parts_of(pipeline)
        if name == "base":
            parts.others |= load_others(base, first_parts(params))
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

"""Metrics on held-out data: the loss of base and trained, and on generated scenes prompt accuracy."""

from pathlib import Path

import pandas as pd
from diffusers import StableDiffusionPipeline

from sdtrain.data.shards import LatentShards
from sdtrain.evaluation.held_out import HeldOut
from sdtrain.evaluation.prompt_accuracy import prompt_accuracy
from sdtrain.ground import randomness
from sdtrain.ground.files import write_json, write_text
from sdtrain.ground.manifests import DatasetManifest, encoders_fingerprint
from sdtrain.ground.statistics import bootstrap_interval
from sdtrain.methods import build_method
from sdtrain.models.parts import parts_of
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
    is_generated = "generated" in DatasetManifest.read(dataset).source
    rows = prompt_accuracy(params, seed, pipelines) if is_generated else []  # before a method changes their parts
    numbers, table = _held_out_loss(params, seed, method, pipelines, shards)
    write_text(loss_table, table.to_csv(index=False, lineterminator="\n"))
    if is_generated:
        numbers |= {f"{row['prompts']}_{row['field']}_accuracy_{row['model']}": row["accuracy"] for row in rows}
        numbers["num_prompts"] = params.num_prompts
    columns = ["prompts", "field", "model", "accuracy", "ci_low", "ci_high", "num"]
    write_text(accuracy_table, pd.DataFrame(rows, columns=columns).to_csv(index=False, lineterminator="\n"))
    write_json(metrics, numbers)
    for name, value in numbers.items():
        print(f"{name:40} {value:.5g}")


def _held_out_loss(
    params: EvaluateParams,
    seed: int,
    method: Section,
    pipelines: dict[str, StableDiffusionPipeline],
    shards: LatentShards,
) -> tuple[dict, pd.DataFrame]:
    """The held-out loss of both models under the method; the base counts as the method before its first step."""
    losses = {}
    for name, pipeline in pipelines.items():
        held_out = HeldOut(
            shards,
            pipeline.vae.config.scaling_factor,
            num_train_timesteps=pipeline.scheduler.config.num_train_timesteps,
            num_timesteps=params.num_timesteps,
            max_samples=params.max_samples,
            batch_size=params.batch_size,
        )
        built = build_method(method, parts_of(pipeline))
        built.trained.to(pipeline.device)
        shards.check_columns(built.columns)
        losses[name] = held_out.losses(built, pipeline.scheduler).double().cpu().numpy()
    gain = (losses["base"] - losses["trained"]).mean(axis=1)
    low, high = bootstrap_interval(gain, params.num_bootstrap, randomness.generator(seed, "bootstrap"))
    numbers = {
        "held_out_loss_base": losses["base"].mean(),
        "held_out_loss_trained": losses["trained"].mean(),
        "held_out_loss_gain": gain.mean(),
        "held_out_loss_gain_ci_low": low,
        "held_out_loss_gain_ci_high": high,
    }
    by_timestep = {name: values.mean(axis=0) for name, values in losses.items()}
    table = pd.DataFrame({"timestep": held_out.timesteps.numpy(), **by_timestep})
    return {name: float(value) for name, value in numbers.items()} | {"num_held_out": held_out.num_samples}, table

"""Numbers on held-out data: the loss of base and trained, and on generated scenes prompt accuracy."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from diffusers import StableDiffusionPipeline

from sdtrain import randomness, scenes
from sdtrain.evaluation.held_out import HeldOut
from sdtrain.files import read_json, write_json, write_text
from sdtrain.manifests import encoders_fingerprint, read_manifest
from sdtrain.methods import build_method, recorded_method
from sdtrain.models.parts import parts_of
from sdtrain.models.pipelines import generate, load_pipeline
from sdtrain.params import EvaluateParams, Section
from sdtrain.shards import LatentShards
from sdtrain.statistics import bootstrap_interval, wilson_interval

_FIELDS = ("color", "shape", "style", "size", "position", "background")


def evaluate_model(
    params: EvaluateParams,
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

    Writes flat numbers to `metrics`; the held-out loss by timestep to `loss_table`; and for generated
    scenes the accuracy by kind of prompt and field to `accuracy_table` (else a table without rows).
    """
    pipelines = {"base": load_pipeline(base), "trained": load_pipeline(model)}
    method = recorded_method(read_json(model / "training_config.json")["params"]["method"])
    shards = LatentShards(latents, "validation", encoders_fingerprint(base))
    numbers, table = _held_out_loss(params, seed, method, pipelines, shards)
    write_text(loss_table, table.to_csv(index=False, lineterminator="\n"))
    rows = []
    if "generated" in read_manifest(dataset, "dataset")["source"]:
        rows = _prompt_accuracy(params, seed, pipelines)
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
    """What each model's method predicts of the held-out images: of the base, as the method is before its first step."""
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


def _prompt_accuracy(params: EvaluateParams, seed: int, pipelines: dict[str, StableDiffusionPipeline]) -> list[dict]:
    """Share of pictures that show what the prompt says, by field.

    Of prompts with new concepts, colour is counted where the object's colour is new, shape where
    the shape is, style where the style is: what the base has never seen. Known prompts count all.
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

"""Exports the trained weights in the forms that programs load; each is loaded back by stock libraries and compared."""

import json
import math
import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from sdtrain import __version__
from sdtrain.data.batches import Batch
from sdtrain.data.shards import Column
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import new_folder, read_json, write_json
from sdtrain.ground.headers import add_metadata
from sdtrain.methods import build_method, recorded_method
from sdtrain.methods.checkpoints import load_checkpoint
from sdtrain.methods.exports import Exported
from sdtrain.methods.method import Method
from sdtrain.models.ic_light import IcLightPipeline
from sdtrain.models.parts import parts_of
from sdtrain.models.sd1 import SD1
from sdtrain.params.schema import ExportParams

_ERROR_IN_16_BIT = 2e-2
"""Relative error allowed between the checkpoint's predictions and those of an export in fp16."""


def export_model(params: ExportParams, base: Path, checkpoints: Path, out: Path) -> None:
    """Write `out`: the chosen checkpoint's weights in every form that the params ask for.

    Raises:
        InputError: the checkpoint is missing or doesn't have these weights, or a form can't hold the model.
        AssertionError: the written weights, or their output, don't match the checkpoint.
    """
    method, scheduler, config = load_checkpoint(checkpoints / params.checkpoint, params.weights, base)
    pipeline = method.pipeline(scheduler)
    probe = _probe(method, pipeline)
    expected = _predict(method, probe)
    lines = [f"{os.fspath(out)}: {params.weights} weights of step {config['step']}"]
    with new_folder(out) as folder:
        # Without what doesn't change the model.
        recorded = {name: value for name, value in config.items() if name not in ("git_commit", "device")}
        write_json(folder / "training_config.json", {**recorded, "export": params.model_dump()})
        history = _history(params, config, read_json(base / "manifest.json"))
        for form in method.export(folder, scheduler, params, base):
            for file in [form.path] if form.path.is_file() else sorted(form.path.rglob("*.safetensors")):
                add_metadata(file, history | _structure(pipeline, form, file))
            name = form.path.name if form.path != folder else "Diffusers folder"
            difference = _difference(name, form, params, config, probe, expected)
            lines.append(f"  {name}: {_size(form.path)}, reloaded output differs by {difference:.1e}")
    print("\n".join(lines))


def _difference(name: str, form: Exported, params: ExportParams, config: dict, probe: Batch, expected: Tensor) -> float:
    """Relative error of the form's predictions; it must be as small as the form allows."""
    loaded = form.load()
    if form.written is not None:
        for part, written in _modules(form.written).items():
            _assert_same_weights(f"{part} of {name}", written, getattr(loaded, part))
    again = build_method(recorded_method(config["params"]["method"]), parts_of(loaded))
    again.trained.requires_grad_(False)  # as the checkpoint's: PyTorch multiplies by weights that train in other ways
    difference = ((_predict(again, probe) - expected).norm() / expected.norm()).item()
    if params.dtype == "fp16" and not math.isfinite(difference):
        raise InputError(
            "export.dtype = 'fp16': some weights or activations are beyond its range of ±65,504; use export.dtype: fp32"
        )
    allowed = form.error if params.dtype == "fp32" else _ERROR_IN_16_BIT
    assert difference <= allowed, (
        f"{name}: its prediction differs from the checkpoint's by {difference:.2e} (relative), at most {allowed:.0e} "
        f"is allowed for {params.dtype}"
    )
    return difference


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"


def _modules(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The parts of a pipeline that hold weights."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _assert_same_weights(name: str, written: nn.Module, loaded: nn.Module) -> None:
    ours, theirs = written.state_dict(), loaded.state_dict()
    differ = [key for key in ours.keys() | theirs.keys() if key not in ours or key not in theirs]
    differ = differ or [key for key in ours if not torch.equal(ours[key].float(), theirs[key].float())]
    assert not differ, f"the {name} differs from the checkpoint's in {len(differ)} tensors, e.g. {differ[0]}"


def _probe(method: Method, pipeline: DiffusionPipeline) -> Batch:
    """Fixed inputs of two rows."""
    rng, size, text = torch.Generator().manual_seed(0), pipeline.unet.config.sample_size, pipeline.text_encoder.config
    latents = torch.randn(2, pipeline.vae.config.latent_channels, size, size, generator=rng)
    input_ids = torch.randint(text.vocab_size, (2, text.max_position_embeddings), generator=rng)
    columns = {name: _random_column(column, rng) for name, column in method.columns.items()}
    return Batch(latents, latents, latents, torch.tensor([10, 900]), input_ids, seeds=[0, 1], columns=columns)


def _random_column(column: Column, rng: torch.Generator) -> Tensor:
    shape = (2, *column.shape)
    if column.dtype == "uint8":
        return torch.randint(256, shape, dtype=torch.uint8, generator=rng)
    return torch.rand(shape, generator=rng)


@torch.no_grad()
def _predict(method: Method, probe: Batch) -> Tensor:
    method.trained.eval()
    return method.predict(method.trained, probe.latents, probe.timesteps, probe)


def _history(params: ExportParams, config: dict, base: dict) -> dict[str, str]:
    """Where an exported file comes from, for its header: ModelSpec 1.0.0's keys, and sdtrain's own."""
    train, resolution = config["params"]["train"], config["params"]["precompute"]["resolution"]
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": params.name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[train["prediction_type"]],
        "sdtrain.version": __version__,
        "sdtrain.run": config["fingerprint"],
        "sdtrain.step": str(config["step"]),
        "sdtrain.weights": params.weights,
        "sdtrain.data": config["identity"]["latents"],
        "sdtrain.base": json.dumps(base["sources"], sort_keys=True),
        "sdtrain.identity": json.dumps(config["identity"], sort_keys=True),
    }


def _structure(pipeline: DiffusionPipeline, form: Exported, file: Path) -> dict[str, str]:
    """ModelSpec's names of the structure: Stable Diffusion 1.x's or a custom one; and of the layout."""
    config = pipeline.unet.config
    sizes = ["block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim"]
    sizes += [] if isinstance(pipeline, IcLightPipeline) else ["in_channels"]
    is_sd1 = all(json.dumps(config[key]) == json.dumps(SD1.unet[key]) for key in sizes)
    kind = form.kind or ("" if file == form.path else file.parent.relative_to(form.path).as_posix())
    return {
        "modelspec.architecture": "/".join(filter(None, ("stable-diffusion-v1" if is_sd1 else "custom", kind))),
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion" if form.is_original else "diffusers",
    }

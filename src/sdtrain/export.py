"""Exports the trained model for stock Diffusers, after a comparison with the checkpoint's weights."""

import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from sdtrain import __version__
from sdtrain.data.batches import Batch
from sdtrain.ground.files import new_folder, read_json, write_json, write_text
from sdtrain.ground.schedules import scaled_lr
from sdtrain.methods import build_method, recorded_method
from sdtrain.methods.checkpoints import load_checkpoint
from sdtrain.methods.method import Method
from sdtrain.models.parts import parts_of
from sdtrain.params.schema import ExportParams

_TOLERANCE = {"fp32": 0.0, "fp16": 2e-2}
"""Relative error allowed between the checkpoint's and the exported model's predictions."""


def export_model(params: ExportParams, base: Path, checkpoints: Path, out: Path) -> None:
    """Write `out`, a Diffusers folder with the chosen checkpoint's weights and the base's other parts.

    Raises:
        InputError: the checkpoint is missing, or doesn't have these weights.
        AssertionError: the written weights, or their output, don't match the checkpoint.
    """
    method, scheduler, config = load_checkpoint(checkpoints / params.checkpoint, params.weights, base)
    pipeline = method.pipeline(scheduler)
    probe = _probe(method, pipeline)
    expected = _predict(method, probe)
    with new_folder(out) as folder:
        if params.dtype == "fp16":
            for part in _modules(pipeline).values():
                part.half()
        pipeline.save_pretrained(folder, safe_serialization=True)
        # Without the git commit, which doesn't change the model.
        recorded = {name: value for name, value in config.items() if name != "git_commit"}
        write_json(folder / "training_config.json", {**recorded, "export": params.model_dump()})
        write_text(folder / "README.md", _model_card(params, config, read_json(base / "manifest.json")))
        loaded = type(pipeline).from_pretrained(folder, dtype=torch.float32)
        for name, part in _modules(pipeline).items():
            _assert_same_weights(name, part, getattr(loaded, name))
        again = build_method(recorded_method(config["params"]["method"]), parts_of(loaded))
        difference = ((_predict(again, probe) - expected).norm() / expected.norm()).item()
        assert difference <= _TOLERANCE[params.dtype], (
            f"the exported model's prediction differs from the checkpoint's by {difference:.2e} (relative), "
            f"at most {_TOLERANCE[params.dtype]:.0e} is allowed for {params.dtype}"
        )
        size_mib = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    print(
        f"{os.fspath(out)}: {params.weights} weights of step {config['step']}, {size_mib:.1f} MiB, "
        f"reloaded output differs by {difference:.1e}"
    )


def _modules(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The parts of a pipeline that hold weights."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _assert_same_weights(name: str, written: nn.Module, loaded: nn.Module) -> None:
    ours, theirs = written.state_dict(), loaded.state_dict()
    differ = [key for key in ours.keys() | theirs.keys() if key not in ours or key not in theirs]
    differ = differ or [key for key in ours if not torch.equal(ours[key].float(), theirs[key].float())]
    assert not differ, f"the exported {name} differs from the checkpoint's in {len(differ)} tensors, e.g. {differ[0]}"


def _probe(method: Method, pipeline: DiffusionPipeline) -> Batch:
    """Fixed inputs of two rows."""
    rng, size, text = torch.Generator().manual_seed(0), pipeline.unet.config.sample_size, pipeline.text_encoder.config
    latents = torch.randn(2, pipeline.vae.config.latent_channels, size, size, generator=rng)
    input_ids = torch.randint(text.vocab_size, (2, text.max_position_embeddings), generator=rng)
    columns = {name: torch.rand(2, *column.shape, generator=rng) for name, column in method.columns.items()}
    return Batch(latents, latents, latents, torch.tensor([10, 900]), input_ids, seeds=[0, 1], columns=columns)


@torch.no_grad()
def _predict(method: Method, probe: Batch) -> Tensor:
    method.trained.eval()
    return method.predict(method.trained, probe.latents, probe.timesteps, probe)


def _model_card(params: ExportParams, config: dict, base: dict) -> str:
    origin = "\n".join(f"- {', '.join(s['parts'])}: " + _origin(s) for s in base["sources"])
    train = config["params"]["train"]
    lr = scaled_lr(train["lr"], train["lr_scaling"], train["batch_size"], train["lr_reference_batch_size"])
    seed, num_train = config["params"]["seed"], config["num_train"]
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
---
# Fine-tuned with sdtrain {__version__}

The UNet was trained for {config["step"]} of {config["num_steps"]} steps on {num_train} images, effective
batch {train["batch_size"]}, learning rate {lr:g} ({train["lr_scheduler"]}), {train["prediction_type"]}
prediction, seed {seed}; held-out loss {config["validation_loss"][params.weights]:.5f}. These are its {params.weights}
weights. `training_config.json` holds every setting.

Base:
{origin}

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
pipeline("a prompt").images[0].save("image.png")
```
"""


def _origin(source: dict) -> str:
    if "repo" in source:
        return f"{source['repo']} at commit {source['commit']}"
    return f"from scratch, seed {source['seed']}" if "unet_config" in source else f"local folder {source['path']}"

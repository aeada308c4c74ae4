"""What a run ends in: the exported model, the grid, the numbers, and images by hand."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from sdtrain import cli
from sdtrain.data.shards import LatentShards
from sdtrain.export import export_model
from sdtrain.ground.diffusion import signal_to_noise_ratio
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import sha256_json
from sdtrain.ground.grid import draw_grid
from sdtrain.ground.headers import read_metadata
from sdtrain.ground.manifests import encoders_fingerprint
from sdtrain.ground.values import read_values
from sdtrain.models.parts import load_parts


@pytest.fixture(scope="module")
def model(workspace, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "model"
    export_model(workspace.make_params().export, workspace.base, run.checkpoints, out)
    return out


def test_stock_diffusers_loads_the_export_and_computes_the_checkpoint(run, model, tmp_path):
    """In a process that has never heard of sdtrain."""
    script = """
import sys, torch
from diffusers import StableDiffusionPipeline
from PIL import Image
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
image = pipeline("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
assert image.size == (64, 64), image.size
torch.save(dict(pipeline.unet.state_dict()), sys.argv[2])
assert not any(name.split(".")[0] == "sdtrain" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script, model, tmp_path / "unet.pt"], check=True, cwd=tmp_path)
    exported = torch.load(tmp_path / "unet.pt", weights_only=True)
    trained = load_file(run.checkpoints / "best" / "ema" / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in trained)


def test_an_export_that_differs_from_the_checkpoint_is_not_kept(workspace, run, tmp_path, monkeypatch):
    save = StableDiffusionPipeline.save_pretrained

    def save_wrongly(self, folder, **options):
        save(self, folder, **options)
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors["conv_out.bias"] += 0.1
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", save_wrongly)
    differs = "the unet of Diffusers folder differs from the checkpoint's in 1 tensors, e.g. conv_out.bias"
    with pytest.raises(AssertionError, match=differs):
        export_model(workspace.make_params().export, workspace.base, run.checkpoints, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_fp16_export_is_half_as_large_and_close(workspace, run, model, tmp_path):
    params = workspace.make_params(export={"dtype": "fp16", "weights": "raw", "checkpoint": "last"})
    export_model(params.export, workspace.base, run.checkpoints, tmp_path / "model")
    path = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "model" / path).stat().st_size < 0.55 * (model / path).stat().st_size
    raw = load_file(run.checkpoints / "last" / "raw" / "diffusion_pytorch_model.safetensors")
    half = load_file(tmp_path / "model" / path)
    assert all(torch.equal(half[name], raw[name].half()) for name in raw)


def test_config_and_headers_tell_where_it_comes_from(workspace, run, model):
    config = json.loads((model / "training_config.json").read_text())
    assert config["export"] == workspace.make_params().export.model_dump()
    assert not {"git_commit", "device"} & set(config)
    trained = read_metadata(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert trained["modelspec.title"] == config["export"]["name"]
    assert trained["modelspec.architecture"] == "custom/unet", "not Stable Diffusion 1.5's sizes"
    assert trained["modelspec.resolution"] == "64x64"
    assert trained["modelspec.prediction_type"] == "epsilon"
    assert trained["sdtrain.run"] == sha256_json(json.loads(trained["sdtrain.identity"]))[:16] == config["fingerprint"]
    assert trained["sdtrain.data"] == config["identity"]["latents"]
    assert json.loads(trained["sdtrain.base"])[0]["path"].endswith("data/builtin")
    assert (trained["sdtrain.step"], trained["sdtrain.weights"]) == (str(config["step"]), "ema")
    assert trained["format"] == "pt"
    assert not [key for key in trained if "date" in key]
    for part in ("vae", "text_encoder"):
        (file,) = (model / part).glob("*.safetensors")
        changed = {"modelspec.architecture": f"custom/{part}"}
        assert read_metadata(file) == {**trained, **changed}


def test_the_same_export_twice_is_the_same_bytes(workspace, run, model, tmp_path):
    export_model(workspace.make_params().export, workspace.base, run.checkpoints, tmp_path / "model")
    files = [path.relative_to(model) for path in sorted(model.rglob("*")) if path.is_file()]
    assert [name for name in files if (model / name).read_bytes() != (tmp_path / "model" / name).read_bytes()] == []


def test_a_full_model_as_one_file(workspace, run, model, tmp_path, capsys):
    """Stock Diffusers reads it back to the bit; the card in its header is the folder's."""
    params = workspace.make_params(export={"single_file": True, "name": "mine"}).export
    export_model(params, workspace.base, run.checkpoints, tmp_path / "model")
    printed = capsys.readouterr().out
    assert "  Diffusers folder: " in printed
    assert "  mine.safetensors: " in printed
    assert "reloaded output differs by 0.0e+00" in printed
    file = tmp_path / "model" / "mine.safetensors"
    loaded = StableDiffusionPipeline.from_single_file(str(file), config=str(tmp_path / "model"))
    for part in ("unet", "vae"):
        exported = load_file(model / part / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(tensor, exported[name]) for name, tensor in getattr(loaded, part).state_dict().items())
    header = read_metadata(file)
    assert header["modelspec.architecture"] == "custom"
    assert header["modelspec.implementation"] == "https://github.com/CompVis/stable-diffusion"
    assert header["sdtrain.run"] == json.loads((model / "training_config.json").read_text())["fingerprint"]


def test_v_prediction_reaches_the_exported_scheduler(workspace, tmp_path):
    run = workspace.train(tmp_path, train={"prediction_type": "v_prediction", "max_steps": 1})
    export_model(workspace.make_params().export, workspace.base, run.checkpoints, tmp_path / "model")
    scheduler = json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"


def test_exporting_weights_that_were_not_kept_is_refused(workspace, tmp_path):
    run = workspace.train(tmp_path, train={"use_ema": False, "max_steps": 1}, export={"weights": "raw"})
    with pytest.raises(InputError, match="has no ema weights; use 'raw'"):
        export_model(workspace.make_params().export, workspace.base, run.checkpoints, tmp_path / "model")


def test_grid_puts_each_image_in_its_place():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    grid = draw_grid({"base": [[red], [red]], "trained": [[blue], [blue]]}, ["one", "two"])
    half = grid.width // 2
    columns = [grid.crop((0, 0, half, grid.height)), grid.crop((half, 0, grid.width, grid.height))]
    counts = [dict((color, n) for n, color in column.getcolors(maxcolors=1 << 24)) for column in columns]
    assert counts[0][255, 0, 0] == counts[1][0, 0, 255] == 2 * 128 * 128
    assert (0, 0, 255) not in counts[0]
    assert (255, 0, 0) not in counts[1]


def test_evaluate_writes_the_numbers_with_their_counts(workspace, model, tmp_path, capsys):
    params = workspace.make_params(validation={"max_samples": 100})
    numbers = workspace.evaluate(model, tmp_path, params)
    num_validation = json.loads((workspace.folder / "dataset.json").read_text())["num_validation"]
    assert numbers["num_held_out"] == num_validation
    told = capsys.readouterr()
    assert f"held-out images: {num_validation} of the validation split" in told.out
    assert f"WARNING: intervals over {num_validation} held-out images are too narrow; raise dataset.val" in told.err
    gain = numbers["held_out_loss_base"] - numbers["held_out_loss_trained"]
    assert numbers["held_out_loss_gain"] == pytest.approx(gain, abs=1e-9)
    assert numbers["held_out_loss_gain_ci_low"] <= gain <= numbers["held_out_loss_gain_ci_high"]
    assert {f"known_color_accuracy_{name}" for name in ("base", "trained")} <= numbers.keys()


def test_a_metric_is_the_mean_of_the_values_in_the_table(workspace, run, model, tmp_path):
    params = workspace.make_params(evaluate={"num_timesteps": 8})
    numbers = workspace.evaluate(model, tmp_path, params, run.checkpoints)
    numbers |= json.loads((tmp_path / "image_sets.json").read_text())
    values = read_values((tmp_path / "values.parquet").read_bytes(), "values.parquet")
    for (metric, name), value in values.groupby(["metric", "model"]).value.mean().items():
        assert numbers[f"{metric}_{name}"] == pytest.approx(value, rel=1e-5), (metric, name)
    assert {"held_out_loss", "text_gap", "known_color_accuracy", "new_color_accuracy"} <= {*values.metric}
    models = {*values[values.metric == "held_out_loss"].model}
    assert models == {"base", "trained", "best_raw", "best_ema", "last_raw", "last_ema"}
    assert numbers["held_out_loss_best_ema"] == pytest.approx(numbers["held_out_loss_trained"], rel=1e-6)
    assert numbers["held_out_loss_last_raw"] != numbers["held_out_loss_last_ema"]
    losses = values[(values.metric == "held_out_loss") & (values.model == "trained")]
    shards = LatentShards(workspace.latents, "validation", encoders_fingerprint(workspace.base))
    captions = dict(zip(shards.ids, shards.captions, strict=True))
    assert len(losses) == numbers["num_held_out"] * params.evaluate.num_timesteps
    assert [captions[item] for item in losses.item] == losses.text.tolist()
    table = pd.read_csv(tmp_path / "loss.csv").set_index("timestep")
    assert losses.groupby("timestep").value.mean().tolist() == pytest.approx(table.trained.tolist(), rel=1e-5)
    snr = signal_to_noise_ratio(load_parts(workspace.base).scheduler.alphas_cumprod)[table.index].numpy()
    weights = np.minimum(snr, 5) / snr
    assert weights[0] < 0.5 < weights[-1] == 1
    expected = (weights * table.trained).sum() / weights.sum()
    assert numbers["held_out_loss_min_snr_trained"] == pytest.approx(expected, rel=1e-5)
    assert numbers["held_out_loss_min_snr_trained"] != pytest.approx(numbers["held_out_loss_trained"], rel=1e-2)
    right = values[(values.metric == "known_color_accuracy") & (values.model == "base")]
    assert right.item.tolist() == [f"known {number:04}" for number in range(params.evaluate.num_prompts)]
    assert right.timestep.isna().all()
    again = tmp_path / "again"
    workspace.evaluate(model, again, params, run.checkpoints)
    assert (again / "values.parquet").read_bytes() == (tmp_path / "values.parquet").read_bytes()


def test_a_model_equal_to_its_base_gains_exactly_nothing_and_three_images_are_called_few(workspace, tmp_path, capsys):
    numbers = workspace.evaluate(workspace.base, tmp_path, workspace.make_params(validation={"max_samples": 3}))
    told = "WARNING: intervals over 3 held-out images are too narrow; raise evaluate.max_samples"
    assert told in capsys.readouterr().err
    assert numbers["held_out_loss_gain"] == numbers["held_out_loss_gain_ci_high"] == 0
    assert numbers["memorized_gain"] == numbers["memorized_guidance"] == numbers["memorized_gain_ci_high"] == 0
    assert numbers["known_shape_accuracy_base"] == numbers["known_shape_accuracy_trained"]


def test_generate_draws_the_same_from_model_and_checkpoint(workspace, run, model, tmp_path, capsys):
    arguments = ["--prompt", "a red circle", "--num-images", "2", "--seed", "5", "--steps", "2"]
    cli.main(["generate", "--model", str(model), *arguments, "--out", str(tmp_path / "model")])
    checkpoint = ["--model", str(run.checkpoints / "best"), "--base", str(workspace.base)]
    cli.main(["generate", *checkpoint, *arguments, "--batch-size", "1", "--out", str(tmp_path / "checkpoint")])
    names = ["000-seed5.png", "001-seed6.png"]
    for folder in ("model", "checkpoint"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    for name in names:
        with Image.open(tmp_path / "model" / name) as one, Image.open(tmp_path / "checkpoint" / name) as two:
            difference = max(high for _, high in ImageChops.difference(one, two).getextrema())
        assert difference <= 1, "batching may round a pixel, no more"
    assert "a red circle" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--model", "tests"], "not a Diffusers model"),
    ],
)
def test_generate_explains_what_is_wrong(root, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit, match=message):
        cli.main(["generate", *arguments, "--prompt", "x", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()

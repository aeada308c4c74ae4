"""IC-Light through everything that a run goes through, and what others make of what it exports."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from sdtrain import cli
from sdtrain.base import resolve_base
from sdtrain.data import lit_scenes
from sdtrain.evaluation.relighting import lit_questions
from sdtrain.export import export_model
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json, sha256_file, write_json
from sdtrain.ground.headers import read_metadata
from sdtrain.ground.values import read_values
from sdtrain.methods import build_method
from sdtrain.methods.checkpoints import load_checkpoint
from sdtrain.models.ic_light import IcLightPipeline
from sdtrain.models.parts import load_parts, read_configs
from sdtrain.models.trained import load_relit
from sdtrain.tools.overfit import overfit_batch
from sdtrain.train import train
from sdtrain.training.devices import build_accelerator
from sdtrain.training.memory import training_costs
from sdtrain.training.optimizer import build_lr_scheduler
from sdtrain.training.step import optimizer_step
from sdtrain.training.trainer import build_trainer
from tests.conftest import BY_MAP, CONSISTENT, EVERYTHING_LIT, WORDS, lit, merged, shrunk_tree
from tests.integration.killed import assert_kill_changes_nothing
from tests.integration.test_processes import Place, assert_same_curves

UNET = "unet/diffusion_pytorch_model.safetensors"
VARIANTS = {
    "fc": WORDS,
    "map": lit("foreground light", **BY_MAP),
    "fixed": lit("foreground light mask", **BY_MAP, consistency_weight=0.1, phi="fixed", consistency_latents="shared"),
    "mlp": CONSISTENT,
    "pixel": lit("foreground light mask", **BY_MAP, consistency_weight=0.1, phi="pixel", consistency_latents="shared"),
    "own": EVERYTHING_LIT,
}


def run_of(relit, name: str, out: Path, base: Path | None = None, **changes):
    return relit.train(out, base, **merged(VARIANTS[name], changes))


@pytest.fixture(scope="module")
def trained(relit, tmp_path_factory):
    """Light by map, with the consistency loss."""
    out = tmp_path_factory.mktemp("trained")
    return run_of(relit, "mlp", out, validation={"num_held_out": 2, "num_inference_steps": 2, "guidance_scale": 2.0})


@pytest.fixture(scope="module")
def model(relit, trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model") / "model"
    export_model(relit.make_params(export={"name": "mine"}).export, relit.base, trained.checkpoints, out)
    return out


def trainer_of(relit, name: str, folder: Path):
    AcceleratorState._reset_state(reset_partial_state=True)
    params = relit.make_params(**VARIANTS.get(name, {}))
    return build_trainer(params, relit.files(folder), build_accelerator(params.train))


@pytest.mark.parametrize("name", ["fc", "fbc", "map"])
def test_before_the_first_step_it_is_the_base_whatever_the_conditions(relit, with_background, tmp_path, name):
    trainer = trainer_of(with_background if name == "fbc" else relit, name, tmp_path)
    assert trainer.parts.unet.conv_in.in_channels == (12 if name == "fbc" else 8)
    batch = trainer.batches.make(0, range(4), torch.device("cpu"))
    assert all(batch.columns[condition].std() > 0 for condition in trainer.method.conditions)
    parts = load_parts(relit.base)
    with torch.no_grad():
        ours = trainer.method.predict(trainer.model, batch.latents, batch.timesteps, batch)
        text = parts.text_encoder(batch.input_ids).last_hidden_state
        assert torch.equal(ours, parts.unet(batch.latents, batch.timesteps, text).sample)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_weight_learns_and_the_frozen_ones_stay_to_the_bit(relit, tmp_path, name):
    trainer = trainer_of(relit, name, tmp_path)
    frozen = {part: getattr(load_parts(relit.base), part).state_dict() for part in ("vae", "text_encoder")}
    before = {key: p.detach().clone() for key, p in trainer.weights.items()}
    schedule = build_lr_scheduler(trainer.optimizer, trainer.params.train, 10, 0)
    for number in range(3):  # zero layers let gradients through one by one
        report = optimizer_step(trainer, schedule, number)
        assert report.sums.isfinite().all()
    unchanged = [key for key, p in trainer.weights.items() if torch.equal(before[key], p)]
    assert unchanged == []
    for part, tensors in frozen.items():
        ours = getattr(trainer.parts, part).state_dict()
        assert all(torch.equal(ours[key], tensor) for key, tensor in tensors.items())


def test_it_says_what_it_uses_and_logs_what_a_loss_of_zero_would_hide(trained):
    curve = trained.validation_curve
    assert curve.loss_raw.iloc[-1] < curve.loss_raw[0]
    assert curve.gap_foreground[0] == curve.gap_light[0] == 0
    assert (curve[["gap_foreground", "gap_light"]].iloc[-1] != 0).all()
    steps = trained.train_curve
    assert steps.loss.tolist() == pytest.approx((steps.loss_denoising + 0.1 * steps.loss_consistency).tolist())
    assert steps.light_difference[0] == 0  # at step 0 it can't see the light yet, and its consistency loss is 0 as well
    assert steps.loss_consistency[0] == pytest.approx(0, abs=1e-12)
    assert steps.light_difference.iloc[-1] > 0


def test_a_run_that_did_nothing_says_so(relit, tmp_path, capfd):
    run_of(relit, "map", tmp_path, train={"lr": 1e-6})
    printed = capfd.readouterr()
    for condition in ("foreground", "light"):
        assert f"step 2: the model hardly uses the {condition}: " in printed.out
        assert f"\nthe model hardly uses the {condition}: with another image's {condition} its held-out" in printed.err
    assert "WARNING: the model ignores what it is told:" in printed.err
    assert "train.lr is too low" in printed.err


def test_foregrounds_that_are_accidentally_zero_are_called_equal(relit, tmp_path, capfd):
    latents = shutil.copytree(relit.latents, tmp_path / "latents")
    for shard in latents.glob("*-*.safetensors"):
        tensors = load_file(shard)
        save_file({**tensors, "foreground": torch.zeros_like(tensors["foreground"])}, shard, read_metadata(shard))
    manifest = read_json(latents / "manifest.json")
    for shard in (shard for split in manifest["splits"].values() for shard in split):
        shard["sha256"] = sha256_file(latents / shard["file"])
    write_json(latents / "manifest.json", manifest)
    relit.train(tmp_path, latents=latents, **VARIANTS["map"])
    assert "all held-out images have the same foreground: there is nothing to learn" in capfd.readouterr().err


def test_a_killed_run_resumes_to_the_bit(relit, tmp_path, capfd):
    """With the consistency loss, whose splits of the light are drawn for each row."""
    assert_kill_changes_nothing(relit, tmp_path, UNET, capfd, CONSISTENT)


@pytest.mark.full
def test_two_processes_train_the_same_curve(relit, tmp_path):
    places = []
    for name, num_processes in (("one", 1), ("two", 2)):
        place = Place(tmp_path / name, relit)
        tree = yaml.safe_load((place.folder / "params.yaml").read_text())
        changed = shrunk_tree(**merged(CONSISTENT, {"train": {"micro_batch_size": tree["train"]["micro_batch_size"]}}))
        tree |= {name: changed[name] for name in ("dataset", "method", "sample")}
        tree["train"] |= CONSISTENT["train"]
        tree["validation"] |= {"prompts": [], "num_held_out": 1}
        (place.folder / "params.yaml").write_text(yaml.safe_dump(tree))
        place.run(NPROC=num_processes)
        places.append(place)
    assert_same_curves(*places)


@pytest.mark.parametrize(
    "train",
    [
        {"micro_batch_size": 2},
        {"gradient_checkpointing": True},
        pytest.param({"precision": "bf16"}, marks=pytest.mark.full),
    ],
)
def test_splits_memory_and_precision_change_rounding_only(relit, trained, tmp_path, train):
    again = run_of(relit, "mlp", tmp_path, train=train)
    tolerance = 0.05 if "precision" in train else 1e-5
    assert again.train_curve.loss.tolist() == pytest.approx(trained.train_curve.loss.tolist(), rel=tolerance)
    if "precision" not in train:
        consistency = trained.train_curve.loss_consistency.tolist()
        assert again.train_curve.loss_consistency.tolist() == pytest.approx(consistency, rel=1e-3, abs=1e-10)


def test_states_and_checkpoints_hold_all_that_trains(trained):
    (state,) = sorted((trained.metrics.parent / "resume").glob("*/step-*"))[-1:]
    names = load_file(state / "weights.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"unet", "light_encoder", "phi"}
    saved = UNet2DConditionModel.from_pretrained(trained.checkpoints / "best" / "ema" / "unet")
    assert saved.config.in_channels == saved.conv_in.in_channels == 8
    assert {path.name for path in (trained.checkpoints / "best" / "ema").iterdir()} == {"unet", "light_encoder", "phi"}


def test_memory_is_estimated_with_all_three_lights(relit):
    configs, costs = read_configs(relit.base), {}
    for name in ("fc", "map", "mlp", "pixel"):
        params = relit.make_params(**VARIANTS[name])
        costs[name] = training_costs(configs, params.method, params.train, (4, 8, 8))
    assert costs["fc"].num_parameters == 2_839_268 + 4 * 64 * 9
    assert costs["map"].num_parameters > costs["fc"].num_parameters
    assert 2.5 < costs["mlp"].activations_bytes / costs["map"].activations_bytes < 3.5
    assert costs["pixel"].activations_bytes > costs["mlp"].activations_bytes  # the decoder's


def test_what_is_exported(relit, trained, model):
    files = {str(path.relative_to(model)) for path in model.rglob("*.safetensors")}
    assert {"mine.safetensors", "mine-original.safetensors", UNET} < files
    saved = load_file(trained.checkpoints / "best" / "ema" / UNET)
    base, offset = load_file(relit.base / UNET), load_file(model / "mine.safetensors")
    exported = load_file(model / UNET)
    assert offset.keys() == base.keys() == exported.keys()
    for key, tensor in offset.items():  # as gradio_demo.py merges it, to the bit
        patched = base[key].float()
        if key == "conv_in.weight":
            patched = torch.cat([patched, torch.zeros_like(patched)], dim=1)
        assert torch.equal(patched + tensor, exported[key]), key
        assert torch.allclose(exported[key], saved[key], rtol=1e-6, atol=1e-7), key
    original = load_file(model / "mine-original.safetensors")
    assert torch.equal(original["input_blocks.0.0.weight"], offset["conv_in.weight"])
    header = read_metadata(model / "mine-original.safetensors")
    assert header["modelspec.implementation"] == "https://github.com/CompVis/stable-diffusion"
    header = read_metadata(model / "mine.safetensors")
    assert header["modelspec.implementation"] == "diffusers"
    assert header["modelspec.architecture"] == "custom/ic-light-fc"
    assert (model / "ic_light.py").read_text().startswith('"""IC-Light for Diffusers')
    assert read_json(model / "model_index.json")["light_encoder"] == ["diffusers", "LightEncoder"]
    assert header["sdtrain.run"] == read_json(model / "training_config.json")["fingerprint"]


def test_fp16_is_half_as_large(relit, trained, model, tmp_path):
    params = relit.make_params(export={"dtype": "fp16", "name": "mine"})
    export_model(params.export, relit.base, trained.checkpoints, tmp_path / "m")
    for name in (UNET, "mine.safetensors"):
        whole, half = ((folder / name).stat().st_size for folder in (model, tmp_path / "m"))
        assert half < 0.52 * whole


def test_checkpoint_and_exports_draw_the_same(relit, trained, model):
    method, scheduler, _ = load_checkpoint(trained.checkpoints / "best", "ema", relit.base)
    pipelines = [
        method.pipeline(scheduler),
        load_relit(model, relit.base),
        load_relit(model, relit.base, "mine.safetensors"),
        load_relit(model, relit.base, "mine-original.safetensors"),
    ]
    scene = lit_scenes.draw_lit(1, 0)
    foreground = lit_scenes.foreground(scene.lit, lit_scenes.light_map("top"), None)

    def draw(pipeline) -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        settings = {"num_inference_steps": 3, "generator": generator, "output_type": "np"}
        return pipeline("a circle", [foreground], light=scene.light[None], **settings).images[0]

    first, *others = [draw(pipeline) for pipeline in pipelines]
    assert all(np.allclose(first, other, atol=1e-4) for other in others)


def test_sample_and_evaluate(relit, trained, model, tmp_path):
    params = relit.make_params(**VARIANTS["mlp"])
    numbers = relit.evaluate(model, tmp_path, params, trained.checkpoints)
    summary = json.loads(trained.metrics.read_text())
    assert numbers["held_out_loss_base"] == pytest.approx(summary["base_validation_loss"], rel=1e-5)
    assert numbers["held_out_loss_trained"] == pytest.approx(summary["best_validation_loss"], rel=1e-5)
    assert numbers["foreground_gap_base"] == numbers["light_gap_base"] == 0
    rows = pd.read_csv(tmp_path / "relighting.csv").set_index(["metric", "model"])
    metrics = {name.removesuffix("_trained") for name in numbers if name.endswith("_trained")}
    assert {*rows.index.get_level_values("metric")} < metrics
    assert {*rows.index.get_level_values("model")} == {"base", "trained", "copy", "vae"}
    assert rows.loc[("light_direction_accuracy", "vae"), "value"] == 1
    assert numbers["light_direction_accuracy_trained_num"] == 4
    assert ((rows.ci_low <= rows.value + 1e-9) & (rows.value <= rows.ci_high + 1e-9)).all()
    assert pd.read_csv(tmp_path / "accuracy.csv").empty
    numbers |= json.loads((tmp_path / "image_sets.json").read_text())
    values = read_values((tmp_path / "values.parquet").read_bytes(), "values.parquet")
    for (metric, name), value in values.groupby(["metric", "model"]).value.mean().items():
        assert numbers[f"{metric}_{name}"] == pytest.approx(value, rel=1e-5), (metric, name)
    assert {*rows.index.get_level_values("metric"), "held_out_loss", "text_gap", "foreground_gap"} <= {*values.metric}
    raw = params.export.model_copy(update={"weights": "raw"})  # so that the last checkpoint isn't what was exported
    export_model(raw, relit.base, trained.checkpoints, tmp_path / "raw")
    asked = params.sample.model_copy(update={"checkpoints": ["last"]})
    samples = relit.sample(tmp_path / "raw", tmp_path, asked, checkpoints=trained.checkpoints)
    assert len(samples.texts) == 2
    assert not any("light" in text for text in samples.texts)
    assert {image.item for image in (*samples.drawn, *samples.given)} == {"scene 0000", "scene 0001"}
    lights = ["left", "right", "top", "bottom"]
    drawn = [(image.model, image.light) for image in samples.drawn if image.prompt == 1]
    assert drawn == [("base", "left"), *((name, light) for name in ("trained", "last") for light in lights)]
    given = [(image.name, image.light) for image in samples.given if image.prompt == 1]
    assert given == [("foreground", None), *(("truth", light) for light in lights)]
    truth = next(image for image in samples.given if image.light == "top")
    scene = replace(lit_questions(0, 1)[0], light_name="top")
    assert np.array_equal(Image.open(tmp_path / "samples" / truth.file), scene.truth)


def save_inputs(folder: Path) -> dict[str, Path]:
    scene = lit_scenes.draw_lit(1, 0)
    places = {name: folder / f"{name}.png" for name in ("foreground", "background")}
    places["light"] = folder / "light.npy"
    for name, path in places.items():
        path.write_bytes(lit_scenes.COLUMNS[name](scene))
    return places


def test_generate_takes_foreground_and_light(relit, trained, model, tmp_path):
    inputs = save_inputs(tmp_path)
    ask = ["--base", str(relit.base), "--prompt", "a red circle", "--steps", "2"]
    ask += ["--foreground", str(inputs["foreground"]), "--light", str(inputs["light"])]
    cli.main(["generate", "--model", str(trained.checkpoints / "best"), *ask, "--out", str(tmp_path / "checkpoint")])
    cli.main(["generate", "--model", str(model), *ask[2:], "--out", str(tmp_path / "model")])
    images = [np.asarray(Image.open(tmp_path / name / "000-seed0.png")) for name in ("model", "checkpoint")]
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"model sees a foreground: give --foreground once, or once for each --prompt; there are 0 for 1"),
        (["foreground"], r"model sees a light: give --light once"),
        (["foreground", "sky"], r"--light .*sky.npy: a map of 16 x 32, and the model was trained with maps of 1 x 5"),
        (["foreground", "background"], r"--background .*background.png: .*model sees foreground and light; leave it"),
    ],
)
def test_generate_explains_what_the_model_sees(model, tmp_path, given, message):
    inputs = save_inputs(tmp_path)
    np.save(tmp_path / "sky.npy", np.ones((16, 32, 3), np.float32))
    inputs["sky"] = tmp_path / "sky.npy"
    options = [text for name in given for text in (f"--{name}".replace("sky", "light"), str(inputs[name]))]
    with pytest.raises(SystemExit, match=message):
        cli.main(["generate", "--model", str(model), "--prompt", "x", "--out", str(tmp_path / "out"), *options])


def test_it_goes_on_from_a_released_offset(relit, with_background, trained, model, root, tmp_path):
    """And that is what it is compared with: the base is IC-Light then."""
    local = {"path": str(root / "data" / "builtin"), "unet_offset": str(model / "mine.safetensors")}
    params = relit.make_params(**merged(VARIANTS["fc"], {"base": local}))
    manifest = resolve_base(params.base, 0, tmp_path / "base")
    assert manifest.sources[-1] == {"path": local["unet_offset"], "parts": ["unet_offset"]}
    started = build_method(params.method, load_parts(tmp_path / "base", ("unet_offset",)))
    exported = load_file(model / UNET)
    assert all(torch.equal(exported[name], tensor) for name, tensor in started.trained.unet.state_dict().items())
    run = run_of(relit, "fc", tmp_path, base=tmp_path / "base")
    assert run.validation_curve.loss_raw[0] != trained.validation_curve.loss_raw[0]
    assert run.validation_curve.gap_foreground[0] != 0
    with pytest.raises(InputError, match=r"method.variant = 'fbc': its UNet has 12 input channels, .* has 8; use meth"):
        with_background.train(tmp_path / "refused", base=tmp_path / "base")
    export_model(params.export, tmp_path / "base", run.checkpoints, tmp_path / "model")
    sample = params.sample.model_copy(update={"num_held_out": 1})
    relit.sample(tmp_path / "model", tmp_path, sample, base=tmp_path / "base")
    assert isinstance(load_relit(tmp_path / "model", relit.base), IcLightPipeline)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("conv_out.bias"),
            r"as the base's UNet: 1 are in one of them only, e.g. conv_out.bias",
        ),
        (lambda tensors: tensors.update({"conv_out.bias": torch.zeros(5)}), r"conv_out.bias has shape \[5\], the b"),
        (
            lambda tensors: tensors.update({"conv_in.weight": tensors["conv_in.weight"][:, :7].contiguous()}),
            r"conv_in.weight has 7 input channels, expected 8 \(foreground\) or 12",
        ),
    ],
)
def test_an_offset_of_another_base_is_refused(relit, model, root, tmp_path, change, message):
    tensors = load_file(model / "mine.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    local = {"path": str(root / "data" / "builtin"), "unet_offset": str(tmp_path / "other.safetensors")}
    params = relit.make_params(**merged(VARIANTS["fc"], {"base": local}))
    with pytest.raises(InputError, match=message):
        resolve_base(params.base, 0, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_an_offset_that_is_not_named_is_refused(relit, root, tmp_path):
    local = {"path": str(root / "data" / "builtin"), "unet_offset": str(tmp_path / "there.safetensors")}
    params = relit.make_params(**merged(VARIANTS["fc"], {"base": local}))
    with pytest.raises(InputError, match=r"there.safetensors': no such file"):
        resolve_base(params.base, 0, tmp_path / "base")
    (tmp_path / "there.safetensors").touch()
    folder = params.base.model_copy(update={"unet_offset": str(tmp_path)})
    with pytest.raises(InputError, match=r"is a folder; name the file in it, .*there.safetensors, or move"):
        resolve_base(folder, 0, tmp_path / "base")


def test_the_loss_can_be_added_to_a_run_that_was_made_without_it(relit, tmp_path):
    """By a branch from its checkpoint, in which there is no φ."""
    vanilla = run_of(relit, "map", tmp_path / "vanilla")
    reset = {"resume": "branch", "branch_from": str(vanilla.checkpoints / "last"), "max_steps": 6}
    reset["resume_reset"] = ["lr", "scheduler", "optimizer"]
    branch = run_of(relit, "mlp", tmp_path / "branch", train=reset)
    started, ended = (run.validation_curve.set_index("step").loss_raw[4] for run in (branch, vanilla))
    assert started == pytest.approx(ended, rel=1e-6)
    assert branch.train_curve.light_difference[0] > 0


def test_a_cache_without_foregrounds_is_refused(workspace, relit, tmp_path):
    params = relit.make_params(**VARIANTS["fc"])
    with pytest.raises(InputError, match=r"has no column 'foreground', which .*dvc repro precompute"):
        train(params, relit.files(tmp_path, latents=workspace.latents))


def test_light_maps_of_another_size_are_refused(relit, tmp_path):
    params = relit.make_params(**VARIANTS["map"])
    params = params.model_copy(update={"method": params.method.model_copy(update={"light_size": [32, 32]})})
    with pytest.raises(InputError, match=r"\(1, 5, 3\), .* needs \(32, 32, 3\); set method.light_size to \[1, 5\]"):
        train(params, relit.files(tmp_path))


def test_one_batch_can_be_overfitted(relit, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    params = relit.make_params(**merged(VARIANTS["map"], {"train": {"lr": 2e-3}}))
    assert overfit_batch(params, relit.files(tmp_path), num_rows=2, num_steps=120) < 0.2


def test_v_prediction_is_learned_too(relit, tmp_path):
    run = run_of(relit, "fixed", tmp_path, train={"prediction_type": "v_prediction", "zero_terminal_snr": True})
    assert np.isfinite(run.train_curve.loss_consistency).all()

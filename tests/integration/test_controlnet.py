"""A ControlNet through everything that a run goes through, and stock Diffusers with what it exports."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from sdtrain import cli
from sdtrain.base import resolve_base
from sdtrain.data.shards import LatentShards, held_out_pictures
from sdtrain.evaluation.held_out import HeldOut
from sdtrain.export import export_model
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json, sha256_file, write_json
from sdtrain.ground.headers import read_metadata
from sdtrain.ground.layout import CONTROLNET_FILE
from sdtrain.ground.manifests import encoders_fingerprint
from sdtrain.methods import build_method
from sdtrain.models.parts import load_parts
from sdtrain.tools.overfit import overfit_batch
from sdtrain.train import train
from sdtrain.training.devices import build_accelerator
from sdtrain.training.optimizer import build_lr_scheduler
from sdtrain.training.step import optimizer_step
from sdtrain.training.trainer import build_trainer
from tests.conftest import HINTED, merged, shrunk_tree
from tests.integration.killed import assert_kill_changes_nothing
from tests.integration.test_processes import Place, assert_same_curves


@pytest.fixture(scope="module")
def controlnet(hinted, tmp_path_factory):
    return hinted.train(tmp_path_factory.mktemp("controlnet"), validation={"num_held_out": 2, "num_inference_steps": 2})


@pytest.fixture(scope="module")
def model(hinted, controlnet, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model") / "model"
    export_model(hinted.make_params(export={"name": "mine"}).export, hinted.base, controlnet.checkpoints, out)
    return out


@pytest.fixture
def trainer(hinted, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    params = hinted.make_params()
    return build_trainer(params, hinted.files(tmp_path), build_accelerator(params.train))


def step(trainer, number: int) -> None:
    optimizer_step(trainer, build_lr_scheduler(trainer.optimizer, trainer.params.train, 10, 0), number)


def test_before_the_first_step_it_is_the_base_whatever_the_hint(hinted, trainer):
    batch = trainer.batches.make(0, range(4), torch.device("cpu"))
    assert batch.columns["hint"].float().std() > 0
    parts = load_parts(hinted.base)
    parts.set_resolution(64)
    with torch.no_grad():
        ours = trainer.method.predict(trainer.model, batch.latents, batch.timesteps, batch)
        text = parts.text_encoder(batch.input_ids).last_hidden_state
        theirs = parts.unet(batch.latents, batch.timesteps, text).sample
        residuals = trainer.model(
            batch.latents, batch.timesteps, text, controlnet_cond=batch.columns["hint"] / 255, return_dict=False
        )
    assert torch.equal(ours, theirs)
    assert all(not tensor.any() for tensor in (*residuals[0], residuals[1]))


def test_its_gradients_wake_within_three_steps_and_the_base_stays_to_the_bit(hinted, trainer):
    awake = []
    for number in range(3):
        before = {name: p.detach().clone() for name, p in trainer.weights.items()}
        batch = trainer.batches.make(number, range(8), torch.device("cpu"))
        trainer.method.losses[0](trainer.model, batch, trainer.objective)["loss"].mean().backward()
        awake.append(sum(bool(p.grad.any()) for p in trainer.weights.values()))
        trainer.optimizer.zero_grad(set_to_none=True)
        step(trainer, number)
        assert any(not torch.equal(before[name], p) for name, p in trainer.weights.items())
    zero_convolutions = [n for n in trainer.weights if n.startswith(("controlnet_down_blocks", "controlnet_mid_block"))]
    assert awake[0] == len(zero_convolutions) < awake[1] < awake[2] == len(trainer.weights)
    base = load_parts(hinted.base)
    for part in ("unet", "vae", "text_encoder"):
        ours = getattr(trainer.parts, part).state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in getattr(base, part).state_dict().items())


def test_it_learns_and_says_what_it_uses(controlnet):
    curve = controlnet.validation_curve
    assert curve.loss_raw.iloc[-1] < curve.loss_raw[0]
    assert curve.gap_hint[0] == 0
    assert curve.gap_text[0] > 0


def test_four_steps_are_said_to_have_done_nothing(hinted, tmp_path, capfd):
    hinted.train(tmp_path, train={"lr": 1e-6})
    printed = capfd.readouterr()
    assert (
        "step 2: the model hardly uses the hint: with another image's hint its held-out loss changes by " in printed.out
    )
    assert "WARNING: the model ignores what it is told:\nthe model hardly uses the hint: " in printed.err
    assert "train.lr is too low" in printed.err


def test_blank_hints_are_called_blank(hinted, tmp_path, capfd):
    """As when a condition was accidentally zero: there is nothing to learn."""
    latents = shutil.copytree(hinted.latents, tmp_path / "latents")
    for shard in latents.glob("*-*.safetensors"):
        tensors = load_file(shard)
        save_file({**tensors, "hint": torch.zeros_like(tensors["hint"])}, shard, read_metadata(shard))
    manifest = read_json(latents / "manifest.json")
    for shard in (shard for split in manifest["splits"].values() for shard in split):
        shard["sha256"] = sha256_file(latents / shard["file"])
    write_json(latents / "manifest.json", manifest)
    hinted.train(tmp_path, latents=latents)
    assert "all held-out images have the same hint: there is nothing to learn from it" in capfd.readouterr().err


def test_a_swapped_hint_is_another_images(hinted, trainer):
    """The gap's loss, computed by hand."""
    shards = LatentShards(hinted.latents, "validation", encoders_fingerprint(hinted.base))
    held_out = HeldOut(shards, 1.0, num_train_timesteps=1000, num_timesteps=2, max_samples=3, batch_size=2)
    for number in range(2):
        step(trainer, number)
    right, wrong = (held_out.losses(trainer.method, trainer.scheduler, swapped=name) for name in (None, "hint"))
    assert held_out.differs("hint")
    assert not torch.equal(right, wrong)
    rows = [shards.ids.index(name) for name in held_out.ids]
    read = shards.read

    def rotated(index, *names, flipped=False):
        place = rows.index(index)
        donor = read(rows[(place + 1) % 3], "hint")
        return {name: donor["hint"] if name == "hint" else read(index, name)[name] for name in names}

    shards.read = rotated
    assert torch.equal(held_out.losses(trainer.method, trainer.scheduler), wrong)


def test_states_and_checkpoints_hold_the_controlnet_alone(controlnet):
    num_trained = json.loads(controlnet.metrics.read_text())["num_parameters"]
    assert num_trained == 1_813_200
    (state,) = sorted((controlnet.metrics.parent / "resume").glob("*/step-*"))[-1:]
    held = sum(tensor.numel() for tensor in load_file(state / "weights.safetensors").values())
    assert held == num_trained
    saved = ControlNetModel.from_pretrained(controlnet.checkpoints / "best" / "ema")
    assert sum(p.numel() for p in saved.parameters()) == num_trained


@pytest.mark.full
def test_a_killed_run_resumes_to_the_bit(hinted, tmp_path, capfd):
    assert_kill_changes_nothing(hinted, tmp_path, CONTROLNET_FILE, capfd, HINTED)


@pytest.mark.full
def test_two_processes_train_the_same_curve(hinted, tmp_path):
    places = []
    for name, num_processes in (("one", 1), ("two", 2)):
        place = Place(tmp_path / name, hinted)
        tree = yaml.safe_load((place.folder / "params.yaml").read_text())
        changed = shrunk_tree(**merged(HINTED, {"train": {"micro_batch_size": tree["train"]["micro_batch_size"]}}))
        tree |= {name: changed[name] for name in ("dataset", "method", "sample")}
        tree["train"] |= HINTED["train"]
        tree["validation"] |= {"prompts": [], "num_held_out": 1}
        (place.folder / "params.yaml").write_text(yaml.safe_dump(tree))
        place.run(NPROC=num_processes)
        places.append(place)
    assert_same_curves(*places)


@pytest.mark.parametrize(
    "train", [{"gradient_checkpointing": True}, pytest.param({"precision": "bf16"}, marks=pytest.mark.full)]
)
def test_memory_and_precision_change_rounding_only(hinted, controlnet, tmp_path, train):
    again = hinted.train(tmp_path, train=train)
    tolerance = 0.05 if "precision" in train else 1e-5
    assert again.train_curve.loss.tolist() == pytest.approx(controlnet.train_curve.loss.tolist(), rel=tolerance)


def test_what_is_exported(controlnet, model):
    assert {path.name for path in model.rglob("*.safetensors")} == {CONTROLNET_FILE, "mine.safetensors"}
    saved = load_file(controlnet.checkpoints / "best" / "ema" / CONTROLNET_FILE)
    for name in (CONTROLNET_FILE, "mine.safetensors"):
        exported = load_file(model / name)
        assert saved.keys() == exported.keys()
        assert all(torch.equal(saved[key], exported[key]) for key in saved)
        header = read_metadata(model / name)
        assert header["modelspec.architecture"] == "custom/controlnet"
        assert header["sdtrain.run"] == read_json(model / "training_config.json")["fingerprint"]
    # By this key ComfyUI and sd-webui-controlnet recognise Diffusers' layout.
    assert "controlnet_cond_embedding.conv_in.weight" in exported


def test_fp16_is_half_as_large(hinted, controlnet, model, tmp_path):
    export_model(
        hinted.make_params(export={"dtype": "fp16"}).export, hinted.base, controlnet.checkpoints, tmp_path / "m"
    )
    whole, half = ((folder / CONTROLNET_FILE).stat().st_size for folder in (model, tmp_path / "m"))
    assert half < 0.52 * whole


def test_stock_diffusers_draws_with_it(hinted, model):
    """And without control, at scale 0, the base's own image."""
    shards = LatentShards(hinted.latents, "validation", encoders_fingerprint(hinted.base))
    (caption,), conditions = held_out_pictures(shards, ["hint"], 1)
    plain = StableDiffusionPipeline.from_pretrained(hinted.base, dtype=torch.float32, safety_checker=None)
    stock = StableDiffusionControlNetPipeline(
        **plain.components, controlnet=ControlNetModel.from_pretrained(model, dtype=torch.float32)
    )

    def draw(pipeline, **options) -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        settings = {"num_inference_steps": 3, "generator": generator, "output_type": "np"}
        return pipeline(caption, height=64, width=64, **settings, **options).images[0]

    image = conditions["hint"][0]
    assert np.array_equal(draw(stock, image=image, controlnet_conditioning_scale=0.0), draw(plain))
    assert not np.array_equal(draw(stock, image=image), draw(plain))


def test_sample_and_evaluate_under_hints(hinted, controlnet, model, tmp_path):
    numbers = hinted.evaluate(model, tmp_path, hinted.make_params(), controlnet.checkpoints)
    summary = json.loads(controlnet.metrics.read_text())
    assert numbers["held_out_loss_base"] == pytest.approx(summary["base_validation_loss"], rel=1e-5)
    assert numbers["held_out_loss_trained"] == pytest.approx(summary["best_validation_loss"], rel=1e-5)
    best = controlnet.validation_curve.set_index("step").loc[summary["best_step"]]
    assert numbers["hint_gap_base"] == 0
    assert numbers["hint_gap_trained"] == pytest.approx(best.gap_hint, rel=1e-3, abs=1e-7)
    rows = pd.read_csv(tmp_path / "accuracy.csv")
    assert set(rows.prompts) == {"known", "empty"}  # nothing new is in this world
    assert set(rows[rows.prompts == "known"].attribute) == {"color", "shape", "style", "background", "hint"}
    assert set(rows[rows.prompts == "empty"].attribute) == {"hint"}
    sample = hinted.make_params().sample
    samples = hinted.sample(model, tmp_path, sample)
    shards = LatentShards(hinted.latents, "validation", encoders_fingerprint(hinted.base))
    captions, conditions = held_out_pictures(shards, ["hint"], 2)
    assert samples.texts == captions
    assert {image.item for image in (*samples.drawn, *samples.given)} == {shards.ids[row] for row in shards.chosen(2)}
    assert [(image.prompt, image.name) for image in samples.given] == [(0, "hint"), (1, "hint")]
    for image, hint in zip(samples.given, conditions["hint"], strict=True):
        assert np.array_equal(Image.open(tmp_path / "samples" / image.file), hint)


def test_generate_takes_hints(hinted, controlnet, model, tmp_path):
    hint = tmp_path / "hint.png"
    Image.new("L", (96, 64), 255).save(hint)
    ask = ["--base", str(hinted.base), "--prompt", "a red circle", "--steps", "2", "--hint", str(hint)]
    for name, place in (("model", model), ("checkpoint", controlnet.checkpoints / "best")):
        cli.main(["generate", "--model", str(place), *ask, "--out", str(tmp_path / name)])
    ours, theirs = ((tmp_path / name / "000-seed0.png").read_bytes() for name in ("model", "checkpoint"))
    assert ours == theirs


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ([], r"model sees a hint: give --hint once, or once for each --prompt; there are 0 for 2"),
        (["a.png", "b.png", "c.png"], r"there are 3 for 2"),
        (["nowhere.png"], r"nowhere.png: file is missing"),
    ],
)
def test_generate_explains_which_hints_it_needs(hinted, model, tmp_path, hints, message):
    options = [option for hint in hints for option in ("--hint", hint)]
    ask = ["--base", str(hinted.base), "--prompt", "x", "--prompt", "y", "--out", str(tmp_path / "out"), *options]
    with pytest.raises(SystemExit, match=message):
        cli.main(["generate", "--model", str(model), *ask])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"diffusion_pytorch_model\.safetensors: no such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"safetensors: not a complete \.safetensors file"),
    ],
)
def test_a_damaged_export_is_refused(hinted, model, tmp_path, damage, message):
    copy, hint = shutil.copytree(model, tmp_path / "model"), tmp_path / "hint.png"
    Image.new("L", (64, 64)).save(hint)
    damage(copy / CONTROLNET_FILE)
    ask = ["--base", str(hinted.base), "--prompt", "x", "--hint", str(hint), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=message):
        cli.main(["generate", "--model", str(copy), *ask])


def test_a_hint_without_a_controlnet_is_refused(hinted, tmp_path):
    ask = ["--prompt", "x", "--hint", "hint.png", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"--hint hint.png: .*base sees prompts only; leave it out"):
        cli.main(["generate", "--model", str(hinted.base), *ask])


def test_it_goes_on_from_a_trained_controlnet(hinted, controlnet, model, root, tmp_path):
    """A local base that has one; without it the run is refused, and so is one of another structure."""
    local = shutil.copytree(root / "data" / "builtin", tmp_path / "local")
    shutil.copytree(model, local / "controlnet", ignore=shutil.ignore_patterns("mine*", "training_config*"))
    params = hinted.make_params(base={"path": str(local)}, method={"start": "base"})
    resolve_base(params.base, 0, tmp_path / "base")
    with pytest.raises(
        InputError, match=r"base has no controlnet to start from; set base.controlnet_repo, or base.path"
    ):
        hinted.train(tmp_path / "refused", method={"start": "base"})
    run = hinted.train(tmp_path, base=tmp_path / "base", method={"start": "base"})
    exported = load_file(model / CONTROLNET_FILE)
    started = build_method(params.method, load_parts(tmp_path / "base", ("controlnet",)))
    assert all(torch.equal(exported[name], tensor) for name, tensor in started.trained.state_dict().items())
    assert run.validation_curve.loss_raw[0] == pytest.approx(read_json(controlnet.metrics)["best_validation_loss"])
    config = json.loads((local / "controlnet" / "config.json").read_text())
    (local / "controlnet" / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 32}))
    with pytest.raises(InputError, match=r"controlnet cross_attention_dim = 32, but unet cross_attention_dim = 128"):
        resolve_base(params.base, 0, tmp_path / "other")


def test_a_cache_without_hints_is_refused(workspace, hinted, tmp_path):
    params = hinted.make_params()
    with pytest.raises(
        InputError, match=r"has no column 'hint', which the training method needs; .*dvc repro precompute"
    ):
        train(params, hinted.files(tmp_path, latents=workspace.latents))


@pytest.mark.full
def test_one_batch_can_be_overfitted(hinted, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    params = hinted.make_params(train={"lr": 5e-3})
    assert overfit_batch(params, hinted.files(tmp_path), num_rows=2, num_steps=120) < 0.1


def test_a_frozen_unet_keeps_its_prediction_type(hinted, tmp_path):
    with pytest.raises(
        InputError, match=r"prediction_type = 'v_prediction': the base predicts 'epsilon', and with meth"
    ):
        hinted.train(tmp_path, train={"prediction_type": "v_prediction"})


def test_a_broken_controlnet_of_the_base_is_named(hinted, model, tmp_path):
    base = shutil.copytree(hinted.base, tmp_path / "base")
    shutil.copytree(model, base / "controlnet", ignore=shutil.ignore_patterns("mine*", "training_config*"))
    weights = base / "controlnet" / CONTROLNET_FILE
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"controlnet: its ControlNet can't be loaded: "):
        load_parts(base, ("controlnet",))

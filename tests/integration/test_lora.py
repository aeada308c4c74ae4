"""A LoRA through everything that a run goes through, and the programs that load it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from sdtrain import cli
from sdtrain.base import resolve_base
from sdtrain.export import export_model
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json
from sdtrain.ground.headers import read_metadata
from sdtrain.ground.layout import ADAPTER_FILE
from sdtrain.models.parts import load_parts
from sdtrain.params.load import load_params
from sdtrain.tools.overfit import overfit_batch
from sdtrain.tools.plan import plan_run
from sdtrain.training.devices import build_accelerator
from sdtrain.training.identity import code_hashes
from sdtrain.training.optimizer import build_lr_scheduler
from sdtrain.training.spec import read_spec
from sdtrain.training.step import optimizer_step
from sdtrain.training.trainer import build_trainer
from tests.conftest import ROOT
from tests.integration.killed import assert_kill_changes_nothing
from tests.integration.test_processes import Place, assert_same_curves

METHOD = {**load_params(ROOT / "recipes" / "lora.yaml").method.model_dump(), "rank": 4, "alpha": 4}
LORA = {"method": METHOD, "train": {"lr": 5e-3}}


def changes(method: dict | None = None, **sections: dict) -> dict:
    """Of the shrunken params: LoRA, and these."""
    return {
        **LORA,
        **sections,
        "method": {**METHOD, **(method or {})},
        "train": {"lr": 5e-3, **sections.get("train", {})},
    }


@pytest.fixture(scope="module")
def lora(workspace, tmp_path_factory):
    return workspace.train(tmp_path_factory.mktemp("lora"), **changes())


@pytest.fixture(scope="module")
def model(workspace, lora, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model") / "model"
    params = workspace.make_params(**changes(export={"name": "mine", "merged": True, "single_file": True}))
    export_model(params.export, workspace.base, lora.checkpoints, out)
    return out


def test_it_learns_and_starts_from_the_base(lora, run):
    assert lora.validation_curve.loss_raw[0] == run.validation_curve.loss_raw[0], "the base's own loss, to the bit"
    assert lora.validation_curve.loss_raw.iloc[-1] < lora.validation_curve.loss_raw[0]


@pytest.mark.parametrize("method", [{}, {"use_dora": True}])
def test_what_is_frozen_stays_to_the_bit(workspace, tmp_path, method):
    AcceleratorState._reset_state(reset_partial_state=True)
    params = workspace.make_params(**changes(method, export={"merged": True}))
    trainer = build_trainer(params, workspace.files(tmp_path), build_accelerator(params.train))
    scheduler = build_lr_scheduler(trainer.optimizer, params.train, 3, 0)
    before = {name: p.detach().clone() for name, p in trainer.weights.items()}
    for step in range(3):
        optimizer_step(trainer, scheduler, step)
    base, trained = load_parts(workspace.base), trainer.parts
    assert all(not torch.equal(before[name], p) for name, p in trainer.weights.items() if ".lora_B." in name)
    for part in ("unet", "vae", "text_encoder"):
        ours = getattr(trained, part).state_dict()
        for name, tensor in getattr(base, part).state_dict().items():
            owner, _, leaf = name.rpartition(".")
            found = ours[name] if name in ours else ours[f"{owner}.base_layer.{leaf}"]
            assert torch.equal(found, tensor), name


def test_states_and_checkpoints_hold_what_trains(workspace, lora, run, tmp_path):
    num_trained = json.loads(lora.metrics.read_text())["num_parameters"]
    assert num_trained == 166_784
    (state,) = sorted((lora.metrics.parent / "resume").glob("*/step-*"))[-1:]
    for name, copies in (("weights", 1), ("ema", 1), ("optimizer", 2)):
        tensors = load_file(state / f"{name}.safetensors")
        held = sum(tensor.numel() for tensor in tensors.values() if tensor.ndim)
        assert held == copies * num_trained
        if name != "optimizer":
            assert all(".lora_" in key for key in tensors)
    assert sum(file.stat().st_size for file in state.glob("*.safetensors")) < 1.05 * 16 * num_trained + 100_000
    adapter = lora.checkpoints / "best" / "ema" / ADAPTER_FILE
    assert [path.name for path in adapter.parent.iterdir()] == [ADAPTER_FILE]
    assert adapter.stat().st_size < 1.05 * 4 * num_trained + 50_000
    whole = run.checkpoints / "best" / "ema" / "diffusion_pytorch_model.safetensors"
    assert adapter.stat().st_size < whole.stat().st_size / 10


@pytest.mark.parametrize(
    "method",
    [{"dropout": 0.1}, pytest.param({"use_dora": True, "target_modules": "attention"}, marks=pytest.mark.full)],
)
def test_a_killed_run_resumes_to_the_bit(workspace, tmp_path, capfd, method):
    """With dropout of its own, and with DoRA's magnitudes."""
    sections = changes(method, export={"merged": True})
    assert_kill_changes_nothing(workspace, tmp_path, ADAPTER_FILE, capfd, sections)


@pytest.mark.full
def test_two_processes_train_the_same_curve(workspace, tmp_path):
    places = []
    for name, num_processes in (("one", 1), ("two", 2)):
        place = Place(tmp_path / name, workspace)
        tree = yaml.safe_load((place.folder / "params.yaml").read_text())
        tree["method"], tree["train"]["lr"] = METHOD, 5e-3
        (place.folder / "params.yaml").write_text(yaml.safe_dump(tree))
        place.run(NPROC=num_processes)
        places.append(place)
    assert_same_curves(*places)


def test_gradient_checkpointing_changes_nothing_but_rounding(workspace, lora, tmp_path):
    again = workspace.train(tmp_path, **changes(train={"gradient_checkpointing": True}))
    assert again.train_curve.loss.tolist() == pytest.approx(lora.train_curve.loss.tolist(), rel=1e-5)


def test_in_bf16_the_adapter_stays_fp32(workspace, lora, tmp_path):
    again = workspace.train(tmp_path, **changes(train={"precision": "bf16"}))
    assert again.train_curve.loss.tolist() == pytest.approx(lora.train_curve.loss.tolist(), rel=0.05)
    assert again.train_curve.loss.tolist() != lora.train_curve.loss.tolist()
    for state in (tmp_path / "resume").glob("*/step-*"):
        for name in ("weights", "ema", "optimizer"):
            tensors = load_file(state / f"{name}.safetensors")
            assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_what_is_exported(lora, model, capsys):
    names = {path.relative_to(model).as_posix() for path in model.rglob("*.safetensors")}
    parts = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    assert names == {
        ADAPTER_FILE, "mine.safetensors", "mine-merged.safetensors", *(f"merged/{part}.safetensors" for part in parts)
    }  # fmt: skip
    saved, exported = load_file(lora.checkpoints / "best" / "ema" / ADAPTER_FILE), load_file(model / ADAPTER_FILE)
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], exported[name]) for name in saved)


def test_headers_tell_what_each_file_is(model):
    fingerprint = read_json(model / "training_config.json")["fingerprint"]
    expected = {
        ADAPTER_FILE: ("custom/lora", "diffusers"),
        "mine.safetensors": ("custom/lora", "diffusers"),
        "mine-merged.safetensors": ("custom", "https://github.com/CompVis/stable-diffusion"),
        "merged/unet/diffusion_pytorch_model.safetensors": ("custom/unet", "diffusers"),
    }
    for name, (architecture, implementation) in expected.items():
        header = read_metadata(model / name)
        assert header["modelspec.architecture"] == architecture
        assert header["modelspec.implementation"] == implementation
        assert (header["sdtrain.run"], header["modelspec.title"]) == (fingerprint, "mine")
    adapter = json.loads(read_metadata(model / ADAPTER_FILE)["lora_adapter_metadata"])
    assert (adapter["unet.r"], adapter["unet.lora_alpha"]) == (4, 4)
    kohya = read_metadata(model / "mine.safetensors")
    assert (kohya["ss_network_module"], kohya["ss_network_dim"], kohya["ss_network_alpha"]) == (
        "networks.lora", "4", "4.0",
    )  # fmt: skip
    assert json.loads(kohya["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "4.0"}


def test_people_load_every_file_without_sdtrain(workspace, model, tmp_path):
    """And get the same image from each, but for rounding, and another one than the base's."""
    script = """
import sys
import numpy, torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
base, model, out = sys.argv[1:]
def draw(pipeline):
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    return pipeline("a large orange star", num_inference_steps=3, generator=torch.Generator().manual_seed(3),
                    output_type="np").images[0]
def load(name=None, **options):
    pipeline = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, safety_checker=None)
    if name:
        pipeline.load_lora_weights(model, weight_name=name)
    return pipeline
single = StableDiffusionPipeline.from_single_file(f"{model}/mine-merged.safetensors", config=f"{model}/merged")
images = {
    "base": draw(load()),
    "diffusers": draw(load("pytorch_lora_weights.safetensors")),
    "kohya": draw(load("mine.safetensors")),
    "merged": draw(StableDiffusionPipeline.from_pretrained(f"{model}/merged", dtype=torch.float32)),
    "single": draw(single),
}
assert not any(name.split(".")[0] == "sdtrain" for name in sys.modules)
numpy.savez(out, **images)
"""
    arguments = [workspace.base, model, tmp_path / "images.npz"]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, cwd=tmp_path)
    import numpy

    images = numpy.load(tmp_path / "images.npz")
    assert (images["kohya"] == images["diffusers"]).all()
    assert (images["single"] == images["merged"]).all()
    assert abs(images["merged"] - images["diffusers"]).max() < 1e-3
    assert abs(images["base"] - images["diffusers"]).max() > 0.01


def evaluated(workspace, model: Path, folder: Path, **sections: dict) -> dict:
    return workspace.evaluate(model, folder, workspace.make_params(**changes(**sections)))


def test_sample_and_evaluate_compare_the_base_with_the_adapter(workspace, lora, model, run, tmp_path):
    params, summary = workspace.make_params(**changes()), json.loads(lora.metrics.read_text())
    numbers = workspace.evaluate(model, tmp_path, params, lora.checkpoints)
    best = lora.validation_curve.set_index("step").loc[summary["best_step"]]
    assert numbers["held_out_loss_best_raw"] == pytest.approx(best.loss_raw, rel=1e-5)
    assert numbers["held_out_loss_last_raw"] == pytest.approx(lora.validation_curve.loss_raw.iloc[-1], rel=1e-5)
    assert numbers["held_out_loss_base"] == pytest.approx(summary["base_validation_loss"], rel=1e-5)
    assert numbers["held_out_loss_trained"] == pytest.approx(summary["best_validation_loss"], rel=1e-5)
    params = workspace.make_params(**changes()).sample
    workspace.sample(model, tmp_path, params)
    with Image.open(tmp_path / "samples" / "grid.png") as grid:
        half = grid.width // 2
        assert grid.crop((0, 40, half, grid.height)).tobytes() != grid.crop((half, 40, 2 * half, grid.height)).tobytes()


def test_dora_is_sampled_and_evaluated_merged(workspace, tmp_path):
    sections = {"export": {"merged": True}}
    run = workspace.train(tmp_path, **changes({"use_dora": True}, **sections))
    params = workspace.make_params(**changes({"use_dora": True}, **sections))
    export_model(params.export, workspace.base, run.checkpoints, tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.safetensors"))
    numbers = evaluated(workspace, tmp_path / "model", tmp_path, method={"use_dora": True}, **sections)
    expected = json.loads(run.metrics.read_text())["best_validation_loss"]
    assert numbers["held_out_loss_trained"] == pytest.approx(expected, rel=1e-4)


def test_generate_draws_from_adapter_merged_and_checkpoint(workspace, lora, model, tmp_path):
    ask = ["--prompt", "a red circle", "--seed", "5", "--steps", "2"]
    base = ["--base", str(workspace.base)]
    places = {"adapter": [str(model), *base], "checkpoint": [str(lora.checkpoints / "best"), *base]}
    places["merged"] = [str(model / "merged")]
    for name, place in places.items():
        cli.main(["generate", "--model", *place, *ask, "--out", str(tmp_path / name)])
    images = {name: Image.open(tmp_path / name / "000-seed5.png").tobytes() for name in places}
    assert images["adapter"] == images["checkpoint"]
    assert max(abs(a - b) for a, b in zip(images["adapter"], images["merged"], strict=True)) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "raw"], r"--weights raw: .*model is an exported model, not a checkpoint"),
        (["--base", "nowhere"], r"--base nowhere: no base model there; .*model needs it"),
    ],
)
def test_generate_explains_what_an_adapter_needs(model, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["generate", "--model", str(model), *arguments, "--prompt", "x", "--out", str(tmp_path / "out")])


def test_an_adapter_of_another_base_is_refused(workspace, model, tmp_path):
    other = workspace.changed_base(tmp_path / "base", "vae/config.json", scaling_factor=0.5)
    sample = workspace.make_params().sample
    with pytest.raises(InputError, match=r"model: was trained on another base than .*base; run `dvc repro`, or use"):
        workspace.sample(model, tmp_path, sample, base=other)


def test_it_is_drawn_at_its_own_resolution_with_its_own_schedule(workspace, tmp_path):
    """A LoRA for v-prediction on a base that predicts ε: the base's own scheduler would draw noise."""
    train = {"prediction_type": "v_prediction", "max_steps": 1}
    run = workspace.train(tmp_path, **changes(train=train))
    params = workspace.make_params(**changes(train=train, export={"merged": True}))
    export_model(params.export, workspace.base, run.checkpoints, tmp_path / "model")
    numbers = evaluated(workspace, tmp_path / "model", tmp_path, train=train)
    expected = json.loads(run.metrics.read_text())["best_validation_loss"]
    assert numbers["held_out_loss_trained"] == pytest.approx(expected, rel=1e-5)
    assert read_metadata(tmp_path / "model" / ADAPTER_FILE)["modelspec.prediction_type"] == "v"


def test_an_export_that_differs_is_not_kept(workspace, lora, tmp_path, monkeypatch):
    """As by the converter that loses half of an adapter."""
    save = StableDiffusionPipeline.save_lora_weights

    def save_wrongly(folder, unet_lora_layers, **options):
        save(folder, {n: t for n, t in unet_lora_layers.items() if "conv1" not in n}, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", save_wrongly)
    with pytest.raises(
        AssertionError, match=r"pytorch_lora_weights.safetensors: its prediction differs from the check"
    ):
        export_model(workspace.make_params(**changes()).export, workspace.base, lora.checkpoints, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_base_with_linear_projections_is_exported(workspace, tmp_path):
    """Where PyTorch multiplies by weights that train in another way: rounding, not another model."""
    config = {**read_json(workspace.base / "unet" / "config.json"), "use_linear_projection": True}
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    params = workspace.make_params(base={"path": str(workspace.base), "unet_config": config})
    resolve_base(params.base, 0, out=tmp_path / "base")
    run = workspace.train(tmp_path, base=tmp_path / "base", **changes())
    export_model(workspace.make_params(**changes()).export, tmp_path / "base", run.checkpoints, tmp_path / "model")
    assert (tmp_path / "model" / ADAPTER_FILE).exists()


def test_weights_beyond_fp16_say_so(workspace, lora, tmp_path):
    shutil.copytree(lora.checkpoints, tmp_path / "checkpoints")
    file = tmp_path / "checkpoints" / "best" / "ema" / ADAPTER_FILE
    tensors, metadata = load_file(file), read_metadata(file)
    save_file({name: 1e6 * tensor for name, tensor in tensors.items()}, file, metadata)
    params = workspace.make_params(**changes(export={"dtype": "fp16"})).export
    with pytest.raises(InputError, match="export.dtype = 'fp16': some weights or activations are beyond its range"):
        export_model(params, workspace.base, tmp_path / "checkpoints", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_adapter_is_named(workspace, lora, model, tmp_path, damage):
    for source, file in ((lora.checkpoints / "best", f"ema/{ADAPTER_FILE}"), (model, ADAPTER_FILE)):
        shutil.copytree(source, tmp_path / source.name)
        path = tmp_path / source.name / file
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:1000])
        elif source != model:  # an exported model without it is none
            path.unlink()
        else:
            continue
        place = ["--model", str(tmp_path / source.name), "--base", str(workspace.base)]
        with pytest.raises(
            SystemExit, match=f"error: .*{ADAPTER_FILE}: (no such file|not a complete .safetensors file)"
        ):
            cli.main(["generate", *place, "--prompt", "x", "--steps", "1", "--out", str(tmp_path / "out")])


def test_with_dropout_another_micro_batch_is_another_run(workspace, tmp_path):
    """It draws by micro-batch; without it the split changes rounding only."""

    def fingerprint(dropout: float, micro_batch_size: int) -> str:
        sections = changes({"dropout": dropout}, train={"micro_batch_size": micro_batch_size})
        return read_spec(workspace.make_params(**sections), workspace.files(tmp_path)).fingerprint

    assert fingerprint(0.1, 8) != fingerprint(0.1, 4)
    assert fingerprint(0.0, 8) == fingerprint(0.0, 4)


def test_how_it_is_exported_is_not_part_of_the_run():
    hashed = set(code_hashes("lora"))
    assert {"sdtrain.methods.lora", "sdtrain.methods.method", "sdtrain.ground.diffusion"} <= hashed
    writing = ("methods.exports", "models.single_file", "models.trained", "ground.headers", "ground.layout")
    assert not hashed & {f"sdtrain.{name}" for name in writing}


def test_a_full_runs_state_is_no_adapters(workspace, run, tmp_path):
    (state,) = sorted((run.metrics.parent / "resume").glob("*/step-*"))[-1:]
    branch = {"resume": "branch", "branch_from": str(state), "max_steps": 9, "resume_reset": ["lr", "scheduler"]}
    with pytest.raises(InputError, match="with method.name = 'finetune', params.yaml says 'lora'"):
        workspace.train(tmp_path, **changes(train=branch))


@pytest.mark.full
def test_one_batch_can_be_overfitted(workspace, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    params = workspace.make_params(**changes({"rank": 16, "alpha": 16}))
    assert overfit_batch(params, workspace.files(tmp_path), num_rows=2, num_steps=120) < 0.1


def test_the_plan_counts_what_trains_and_what_is_exported(workspace, tmp_path):
    def planned(method: dict, **export: object) -> tuple[str, str]:
        sections = changes(method, base={"path": str(ROOT / "data" / "builtin")}, export=export)
        lines = plan_run(workspace.make_params(**sections), workspace.files(tmp_path), workspace.dataset, 0)
        return tuple(next(line for line in lines if line.startswith(name)) for name in ("trained", "disk model"))

    trained, model = planned({})
    assert "166,784 parameters (lora), adamw, fp32" in trained
    assert "1.27 MiB (about, fp32)" in model, "two adapters"
    assert "0.64 MiB (about, fp16)" in planned({}, dtype="fp16")[1]
    assert "19.37 MiB" in planned({}, merged=True)[1]
    assert "37.46 MiB" in planned({}, merged=True, single_file=True)[1]
    assert "36.19 MiB" in planned({"use_dora": True}, merged=True, single_file=True)[1], "no adapter"

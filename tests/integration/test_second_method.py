"""The seam holds for a method that the package doesn't know: all that training does, without a change to it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdtrain.data.batches import BatchMaker
from sdtrain.data.shards import Column, LatentShards
from sdtrain.export import export_model
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json, sha256_file, write_json
from sdtrain.ground.manifests import encoders_fingerprint
from sdtrain.methods import METHODS, Kind, finetune
from sdtrain.methods.checkpoints import load_checkpoint
from sdtrain.models.parts import parts_of
from sdtrain.models.pipelines import load_pipeline
from sdtrain.params.load import check_params
from sdtrain.params.schema import FinetuneParams, Params
from sdtrain.precompute import precompute_latents
from sdtrain.train import train
from sdtrain.training.devices import build_accelerator
from sdtrain.training.files import TrainFiles
from sdtrain.training.trainer import build_trainer
from tests.conftest import ROOT, shrunk_tree
from tests.integration.time_embedding import TimeEmbedding, TimeEmbeddingParams

STEPS = {"max_steps": 6, "save_every_n_steps": 2, "micro_batch_size": 2, "batch_size": 8}
WEIGHTS = "ema/time_embedding.safetensors"


def params_of(**changes) -> Params:
    method = TimeEmbeddingParams(name="time_embedding", weight=0.5)
    return check_params(shrunk_tree(train={**STEPS, **changes})).model_copy(update={"method": method})


def files_of(folder: Path, base: Path, latents: Path) -> TrainFiles:
    names = ("checkpoints", "train.json", "train.csv", "speed.csv", "validation.csv", "validation", "runs", "resume")
    return TrainFiles(base, latents, *(folder / name for name in names))


def run_here(files: TrainFiles, **changes) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    train(params_of(**changes), files)


def run_elsewhere(files: TrainFiles, num_processes: int = 1, kill_at: int | None = None) -> subprocess.CompletedProcess:
    """Train in processes of their own; `kill_at` ends them by SIGKILL in the step that follows so many."""
    command = [sys.executable, "-m"]
    if num_processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", "-m"]
    places = [str(path) for path in (files.checkpoints.parent, files.base, files.latents)]
    command += ["tests.integration.test_second_method", *places, str(kill_at)]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    threads = {"OMP_NUM_THREADS": "1"} if num_processes > 1 else {}
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, **threads}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def latents(workspace, tmp_path_factory) -> Path:
    """The cache with a further column, the mean of each latent."""
    folder = tmp_path_factory.mktemp("bright") / "latents"
    shutil.copytree(workspace.latents, folder)
    manifest = read_json(folder / "manifest.json")
    for shard in (shard for shards in manifest["splits"].values() for shard in shards):
        path = folder / shard["file"]
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors["brightness"] = tensors["mean"].float().mean(dim=(1, 2, 3))[:, None]
        save_file(tensors, path, metadata)
        shard["sha256"] = sha256_file(path)
    write_json(folder / "manifest.json", manifest)
    return folder


@pytest.fixture(scope="module")
def whole(workspace, latents, tmp_path_factory) -> TrainFiles:
    """A run that nothing stopped."""
    files = files_of(tmp_path_factory.mktemp("whole"), workspace.base, latents)
    run_here(files)
    return files


def test_it_trains_its_own_weights_and_nothing_else(workspace, whole):
    config = json.loads((whole.checkpoints / "last" / "training_config.json").read_text())
    assert config["params"]["method"] == {"name": "time_embedding", "weight": 0.5}
    base = load_file(workspace.base / "unet" / "diffusion_pytorch_model.safetensors")
    (state, *_) = sorted((whole.states).glob("*/step-*"))[::-1]
    for name in ("weights", "ema"):
        saved = load_file(state / f"{name}.safetensors")
        assert {key.rsplit(".", 2)[0] for key in saved} == {"time_embedding"}
    assert any(not torch.equal(tensor, base[name].float()) for name, tensor in saved.items())
    size = sum(path.stat().st_size for path in state.glob("*.safetensors"))
    num_trained = json.loads(whole.metrics.read_text())["num_parameters"]
    assert num_trained == sum(tensor.numel() for tensor in saved.values())
    assert size < 1.2 * 16 * num_trained + 10_000, "weights, average and two moments of what trains"


def test_both_losses_are_minimised_and_logged(whole):
    curve = pd.read_csv(whole.train_curve)
    assert curve.loss.tolist() == pytest.approx((curve.denoising + 0.5 * curve.consistency).tolist())
    assert (curve.consistency > 0).all()
    validation = pd.read_csv(whole.validation_curve)
    assert validation.loss_raw.iloc[-1] != validation.loss_raw[0]


def test_a_killed_run_resumes_to_the_bit(workspace, latents, whole, tmp_path, capfd):
    files = files_of(tmp_path, workspace.base, latents)
    killed = run_elsewhere(files, kill_at=3)
    assert killed.returncode == -9, killed.stderr
    run_here(files)
    assert "resumes from step 2 of 6" in capfd.readouterr().out
    for name in ("best", "last"):
        assert (files.checkpoints / name / WEIGHTS).read_bytes() == (whole.checkpoints / name / WEIGHTS).read_bytes()
    for name in ("train_curve", "validation_curve", "metrics"):
        assert getattr(files, name).read_bytes() == getattr(whole, name).read_bytes()


def test_two_processes_train_the_same_curve(workspace, latents, whole, tmp_path):
    """Two loss passes, of which the last sums gradients over the processes, and two micro-batches."""
    files = files_of(tmp_path, workspace.base, latents)
    done = run_elsewhere(files, num_processes=2)
    assert done.returncode == 0, done.stderr
    for name in ("train_curve", "validation_curve"):
        one, two = (pd.read_csv(getattr(place, name)) for place in (whole, files))
        pd.testing.assert_frame_equal(one, two, rtol=2e-4, atol=1e-9)


def test_it_is_exported_and_evaluated(workspace, latents, whole, tmp_path):
    params = params_of()
    export_model(params.export, workspace.base, whole.checkpoints, tmp_path / "model")
    exported = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(whole.checkpoints / "best" / WEIGHTS).items():
        assert torch.equal(exported[f"time_embedding.{name}"], tensor)
    numbers = workspace.evaluate(tmp_path / "model", tmp_path, params, latents=latents)
    summary = json.loads(whole.metrics.read_text())
    assert numbers["held_out_loss_trained"] == pytest.approx(summary["best_validation_loss"], rel=1e-5)
    assert numbers["held_out_loss_base"] == pytest.approx(summary["base_validation_loss"], rel=1e-5)


def test_a_cache_without_its_column_is_refused(workspace, tmp_path):
    with pytest.raises(InputError, match="has no column 'brightness', which the training method needs; it has input_"):
        run_here(files_of(tmp_path, workspace.base, workspace.latents))


def test_gradient_checkpointing_changes_rounding_only(workspace, latents, whole, tmp_path):
    files = files_of(tmp_path, workspace.base, latents)
    run_here(files, gradient_checkpointing=True)
    losses = [pd.read_csv(place.train_curve).loss.tolist() for place in (files, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_flipped_image_needs_its_own_column(workspace, tmp_path):
    """A column that shows the image must have been cached for the flipped one, too."""
    params = params_of()
    flipping = params.precompute.model_copy(update={"random_flip": True})
    precompute_latents(flipping, 0, workspace.base, workspace.dataset, tmp_path / "latents", tmp_path / "m.json")
    for path in (tmp_path / "latents").glob("*-*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        save_file({**tensors, "hint": torch.zeros(len(tensors["mean"]), 3)}, path, metadata)
    shards = LatentShards(tmp_path / "latents", "train", encoders_fingerprint(workspace.base))
    shards.check_columns({"hint": Column((3,), flips=False)})
    with pytest.raises(InputError, match="has no column 'hint_flipped', which the training method needs"):
        shards.check_columns({"hint": Column((3,), flips=True)})
    with pytest.raises(InputError, match=r"column 'hint' has shape \(3,\), the training method needs \(4,\)"):
        shards.check_columns({"hint": Column((4,), flips=False)})


def test_what_a_method_starts_with_at_random_follows_from_the_seed(workspace, monkeypatch):
    drawn = []

    def build(params, parts):
        drawn.append(torch.rand(3).tolist())
        return finetune.build(params, parts)

    monkeypatch.setitem(METHODS, "finetune", Kind(FinetuneParams, build))
    for seed in (0, 0, 1):
        AcceleratorState._reset_state(reset_partial_state=True)
        params = check_params(shrunk_tree(train={"seed": seed}))
        build_trainer(params, workspace.files(Path("nowhere")), build_accelerator(params.train))
    assert drawn[0] == drawn[1] != drawn[2]


def test_modules_of_a_pipeline_beyond_the_unet_reach_the_method(workspace, tmp_path):
    """As of a ControlNet's: its class is that of model_index.json, and the method is built on what it trained."""
    pipeline = load_pipeline(workspace.base)
    controlnet = ControlNetModel.from_unet(pipeline.unet)
    parts = {**pipeline.components, "controlnet": controlnet}
    StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "model")
    loaded = parts_of(load_pipeline(tmp_path / "model"))
    assert list(loaded.others) == ["controlnet"]
    for name, tensor in controlnet.state_dict().items():
        assert torch.equal(loaded.others["controlnet"].state_dict()[name], tensor)
    assert not any(p.requires_grad for module in loaded.modules() for p in module.parameters())


def test_a_branch_from_another_methods_weights_is_refused(workspace, whole, latents, tmp_path):
    source = sorted(whole.states.glob("*/step-*"))[-1]
    train = {"resume": "branch", "branch_from": str(source), "max_steps": 9, "resume_reset": ["scheduler"]}
    with pytest.raises(InputError, match="with method.name = 'time_embedding', params.yaml says 'finetune'"):
        workspace.train(tmp_path, latents=latents, train=train)


def test_a_checkpoint_of_another_base_is_refused(workspace, whole, tmp_path):
    other = workspace.changed_base(tmp_path / "base", "vae/config.json", scaling_factor=0.5)
    with pytest.raises(InputError, match="was trained on another base than"):
        load_checkpoint(whole.checkpoints / "best", None, other)


def test_a_logged_value_that_is_not_finite_stops_the_run(workspace, latents, tmp_path, monkeypatch):
    original = TimeEmbedding.consistency

    def consistency(self, *arguments):
        values = original(self, *arguments)
        return {**values, "consistency": values["consistency"] * torch.nan}

    monkeypatch.setattr(TimeEmbedding, "consistency", consistency)
    with pytest.raises(InputError, match="the logged consistency (is no longer|stopped being) finite"):
        run_here(files_of(tmp_path, workspace.base, latents))


def main(folder: str, base: str, latents: str, kill_at: str) -> None:
    make = BatchMaker.make

    def make_or_die(self, step, *arguments):
        if str(step) == kill_at:
            os.kill(os.getpid(), 9)
        return make(self, step, *arguments)

    BatchMaker.make = make_or_die
    train(params_of(), files_of(Path(folder), Path(base), Path(latents)))


if __name__ == "__main__":
    main(*sys.argv[1:])

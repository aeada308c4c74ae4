"""What is checked before the first step: each fault is put in place, and named."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json, sha256_file, write_json
from sdtrain.training import disk, memory, preflight
from sdtrain.training.memory import Costs


@pytest.fixture
def latents(workspace, tmp_path):
    """A copy of the cache to spoil."""
    shutil.copytree(workspace.latents, tmp_path / "latents")
    return tmp_path / "latents"


def rescale(latents, factor: float) -> None:
    for path in [*latents.glob("train-*"), *latents.glob("validation-*")]:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors["mean"] = (tensors["mean"].float() * factor).half()
        tensors["logvar"] = (tensors["logvar"].float() + 2 * torch.tensor(factor).log()).half()
        save_file(tensors, path, metadata)
    manifest = read_json(latents / "manifest.json")
    for shard in [shard for split in manifest["splits"].values() for shard in split]:
        shard["sha256"] = sha256_file(latents / shard["file"])
    write_json(latents / "manifest.json", manifest)


def edit(path, **changes) -> None:
    write_json(path, {**read_json(path), **changes})


def test_a_cache_of_other_params_is_refused(workspace, latents, tmp_path):
    with pytest.raises(InputError, match=r"precompute.center_crop = True, params.yaml says False; run `dvc repro pre"):
        workspace.train(tmp_path, latents=latents, precompute={"center_crop": False}, dataset={"source": "imagefolder"})
    with pytest.raises(InputError, match="was made with seed = 0, params.yaml says 7"):
        workspace.train(tmp_path, latents=latents, seed=7)


def test_token_ids_beyond_the_vocabulary_are_refused(workspace, latents, tmp_path):
    edit(latents / "manifest.json", max_token_id=60_000)
    with pytest.raises(InputError, match="has token id 60000, but the text encoder knows 0 to"):
        workspace.train(tmp_path, latents=latents)


def test_latents_that_were_scaled_before_are_refused(workspace, latents, tmp_path):
    rescale(latents, 0.17782)
    with pytest.raises(InputError, match=r"standard deviation is 0.1\d\d, expected about 1 .*applied twice"):
        workspace.train(tmp_path, latents=latents)


def test_a_cache_that_the_vae_did_not_make_is_refused(workspace, latents, tmp_path):
    """Off by a factor that the standard deviation doesn't show."""
    rescale(latents, 1.2)
    with pytest.raises(InputError, match=r"doesn't match what the VAE .* \(relative error 0.20; the cache is 1.200"):
        workspace.train(tmp_path, latents=latents)


def test_a_vae_that_loses_the_image_is_refused(workspace, latents, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL
    from diffusers.models.autoencoders.vae import DecoderOutput

    def grey(self, z, *arguments, **keywords):
        return DecoderOutput(sample=torch.zeros(len(z), 3, 8 * z.shape[2], 8 * z.shape[3]))

    monkeypatch.setattr(AutoencoderKL, "decode", grey)
    with pytest.raises(
        InputError, match=r"round trip has a PSNR of \d\.\d dB on the probe images, expected at least 12"
    ):
        workspace.train(tmp_path, latents=latents)


def test_a_base_that_predicts_something_else_is_refused(workspace, tmp_path):
    """An ε-model whose scheduler says that it predicts the velocity."""
    base = workspace.changed_base(tmp_path / "base", "scheduler/scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(InputError, match=r"loss is 0.3\d+ as its .* 'v_prediction', but 0.1\d+ with 'epsilon'; fix"):
        workspace.train(tmp_path / "run", base=base)


def test_a_base_that_predicts_nothing_is_refused_unless_it_is_to_be_trained_from_scratch():
    losses = {"epsilon": 1.02, "v_prediction": 0.8}
    preflight.check_base_loss(losses, "epsilon", from_scratch=True)
    with pytest.raises(InputError, match=r"loss is 1.020, expected below 1"):
        preflight.check_base_loss(losses, "epsilon", from_scratch=False)
    with pytest.raises(InputError, match="loss is nan"):
        preflight.check_base_loss(
            {"epsilon": float("nan"), "v_prediction": float("nan")}, "epsilon", from_scratch=False
        )


def test_a_zero_terminal_base_must_be_named(workspace, tmp_path):
    base = workspace.changed_base(tmp_path / "base", "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match="train.zero_terminal_snr = False: the base's scheduler has rescale_betas"):
        workspace.train(tmp_path / "run", base=base)


COSTS = Costs(10, 100 << 30, 100 << 30, 200 << 30, 100 << 30, 1 << 30, 1 << 30)


def test_a_full_disk_is_told_before_training(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: free._replace(free=5 << 30))
    with pytest.raises(InputError, match=r"has 5.0 GiB free, saved states and checkpoints need 1800.0 GiB"):
        disk.check_disk(COSTS, 1, tmp_path / "resume", tmp_path / "out", 0)
    with pytest.raises(InputError, match=r"need 1700.0 GiB"):
        disk.check_disk(COSTS, 1, tmp_path / "resume", tmp_path / "out", 100 << 30)


def test_too_little_memory_is_told_before_training(monkeypatch, capsys):
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "total_memory_bytes", lambda _: 24 << 30)
    with pytest.raises(InputError, match=r"alone need about 501.0 GiB, the cpu has 24.0 GiB; use train.optimizer"):
        memory.check_memory(COSTS, cpu)
    memory.check_memory(Costs(10, 1 << 30, 1 << 30, 2 << 30, 1 << 30, 1 << 30, 30 << 30), cpu)
    assert "an estimated 36.0 GiB are needed, the cpu has 24.0 GiB; a smaller train.micro" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA GPU")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": "adamw_8bit"}, "train.optimizer = 'adamw_8bit': needs a CUDA GPU, this run is on the cpu"),
        ({"attention_backend": "cudnn"}, "train.attention_backend = 'cudnn': needs a GPU; on a CPU there are auto"),
        ({"attention_backend": "efficient"}, "train.attention_backend = 'efficient': needs a GPU"),
    ],
)
def test_what_the_device_cannot_do_is_refused(workspace, tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        workspace.train(tmp_path, train=changes)


def test_a_missing_tracker_or_compiler_is_named(workspace, tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else found(name, *a))
    with pytest.raises(InputError, match=r"wandb isn't installed; run `pip install '.\[wandb\]'`"):
        workspace.train(tmp_path, train={"trackers": ["wandb"]})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"train.compile = True: torch.compile needs a C\+\+ compiler"):
        workspace.train(tmp_path, train={"compile": True})


def test_a_sound_run_says_what_was_checked(workspace, tmp_path, capsys):
    workspace.train(tmp_path, train={"max_steps": 1})
    assert "latents' std 1.0" in (out := capsys.readouterr().out)
    assert "VAE round trip" in out
    assert json.loads((tmp_path / "train.json").read_text())["base_validation_loss"] < 0.5

"""Training: what must not depend on how it is run, and what it leaves behind."""

import json
import math
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from sdtrain.ground.errors import InputError
from sdtrain.methods.checkpoints import load_checkpoint
from sdtrain.models.parts import load_unet
from sdtrain.precompute import precompute_latents
from sdtrain.training.identity import fingerprint


def weights(run, checkpoint="last", kind="raw"):
    return load_file(run.checkpoints / checkpoint / kind / "diffusion_pytorch_model.safetensors")


def test_the_same_params_give_the_same_bits(workspace, run, tmp_path):
    again = workspace.train(tmp_path)
    for kind in ("raw", "ema"):
        one, two = weights(run, kind=kind), weights(again, kind=kind)
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert again.train_curve.equals(run.train_curve)
    assert again.metrics.read_bytes() == run.metrics.read_bytes()


def test_accumulation_changes_rounding_only(workspace, run, tmp_path):
    split = workspace.train(tmp_path, train={"micro_batch_size": 2})
    assert split.train_curve.loss.tolist() == pytest.approx(run.train_curve.loss.tolist(), rel=1e-4)
    assert split.train_curve.grad_norm.tolist() == pytest.approx(run.train_curve.grad_norm.tolist(), rel=1e-3)


def test_gradient_checkpointing_changes_rounding_only(workspace, run, tmp_path):
    recomputed = workspace.train(tmp_path, train={"gradient_checkpointing": True})
    assert recomputed.train_curve.loss.tolist() == pytest.approx(run.train_curve.loss.tolist(), rel=1e-5)


def test_another_training_seed_sees_other_noise_but_the_same_cache_and_held_out_questions(workspace, run, tmp_path):
    other = workspace.train(tmp_path, train={"seed": 1})
    assert other.validation_curve.loss_raw[0] == run.validation_curve.loss_raw[0]
    assert other.train_curve.loss[0] != run.train_curve.loss[0]


def test_ema_follows_its_formula(workspace, tmp_path):
    """After two steps the average is d·w₁ + (1-d)·w₂ with d = min((1+1)/(10+1), ema_decay)."""
    steady = {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    first = weights(workspace.train(tmp_path / "one", train={**steady, "max_steps": 1}))
    two = workspace.train(tmp_path / "two", train={**steady, "max_steps": 2})
    second, average = weights(two), weights(two, kind="ema")
    decay = 2 / 11
    for name in first:
        torch.testing.assert_close(
            average[name], decay * first[name] + (1 - decay) * second[name], rtol=1e-5, atol=1e-7
        )


def test_without_ema_no_ema_is_kept(workspace, tmp_path):
    run = workspace.train(tmp_path, train={"use_ema": False}, export={"weights": "raw"})
    assert not (run.checkpoints / "last" / "ema").exists()
    assert run.validation_curve.loss_ema.isna().all()


def test_best_is_the_validation_with_the_least_loss(run):
    curve = run.validation_curve
    assert curve.step.tolist() == [0, 2, 4]
    trained = curve[curve.step > 0]
    best = json.loads((run.checkpoints / "best" / "training_config.json").read_text())
    assert best["step"] == trained.step[trained.loss_ema.idxmin()]
    assert best["validation_loss"]["ema"] == pytest.approx(trained.loss_ema.min())
    summary = json.loads(run.metrics.read_text())
    assert summary["best_step"] == best["step"]
    assert summary["base_validation_loss"] == pytest.approx(curve.loss_raw[0])


def test_checkpoints_hold_what_made_them(run, workspace):
    config = json.loads((run.checkpoints / "last" / "training_config.json").read_text())
    assert config["step"] == config["num_steps"] == 4
    assert config["params"] == workspace.make_params().model_dump()
    assert config["fingerprint"] == fingerprint(config["identity"])
    assert {"torch", "diffusers", "transformers", "accelerate"} < set(config["identity"]["libraries"])
    assert set(config["identity"]["code"]) >= {
        "sdtrain.training.step",
        "sdtrain.data.batches",
        "sdtrain.ground.diffusion",
        "sdtrain.ground.randomness",
    }
    assert config["resumed_from"] is None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert config["git_commit"] == (commit or None)
    assert config["device"].endswith(f"{os.cpu_count()} cores") or torch.accelerator.is_available()


def test_training_moves_the_weights_and_lowers_the_loss(workspace, run, tmp_path):
    """Forty steps on sixty scenes: the held-out loss falls below the base's."""
    longer = workspace.train(
        tmp_path, train={"max_steps": 40, "lr": 5.0e-4}, validation={"every_n_steps": 40, "max_samples": 9}
    )
    assert longer.validation_curve.loss_raw.iloc[-1] < longer.validation_curve.loss_raw[0]


def test_max_epochs_counts_passes(workspace, tmp_path):
    num_train = json.loads((workspace.folder / "dataset.json").read_text())["num_train"]
    run = workspace.train(
        tmp_path, train={"max_steps": None, "max_epochs": 1, "batch_size": 16, "micro_batch_size": 16}
    )
    assert json.loads(run.metrics.read_text())["num_steps"] == math.ceil(num_train / 16)


def test_v_prediction_trains_and_is_compared_in_epsilon(workspace, tmp_path):
    run = workspace.train(tmp_path, train={"prediction_type": "v_prediction", "max_steps": 2})
    config = json.loads((run.checkpoints / "last" / "training_config.json").read_text())
    assert config["params"]["train"]["prediction_type"] == "v_prediction"
    assert (
        run.train_curve.loss[0] > 1.2 * workspace.train(tmp_path / "e", train={"max_steps": 1}).train_curve.loss[0]
    ), "a UNet that predicts noise is a poor predictor of velocity"


def test_bf16_trains_close_to_fp32(workspace, run, tmp_path):
    bf16 = workspace.train(tmp_path, train={"precision": "bf16"})
    assert bf16.train_curve.loss.tolist() == pytest.approx(run.train_curve.loss.tolist(), rel=5e-2)
    assert bf16.train_curve.loss.tolist() != run.train_curve.loss.tolist()
    assert weights(bf16)["conv_in.weight"].dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA GPU")
def test_fp16_without_a_gpu_is_refused(workspace, tmp_path):
    with pytest.raises(InputError, match="fp16.*needs a CUDA GPU"):
        workspace.train(tmp_path, train={"precision": "fp16"})


def test_a_loss_that_explodes_stops_the_run_and_saves_nothing(workspace, tmp_path):
    with pytest.raises(InputError, match="stopped being finite between steps"):
        workspace.train(
            tmp_path, train={"lr": 1.0e30, "lr_scheduler": "constant", "max_steps": 6, "max_grad_norm": None}
        )
    assert not list(tmp_path.glob("checkpoints*"))
    assert not list((tmp_path / "resume").glob("*/step-*"))


def test_warmup_longer_than_the_epochs_is_refused(workspace, tmp_path):
    with pytest.raises(InputError, match=r"lr_warmup_steps = 9: must be below the 7 steps"):
        workspace.train(tmp_path, train={"max_steps": None, "max_epochs": 1, "lr_warmup_steps": 9})


def test_a_cache_of_another_vae_is_refused(workspace, tmp_path):
    other = workspace.changed_base(tmp_path / "base", "vae/config.json", scaling_factor=0.5)
    with pytest.raises(InputError, match="encoded by another base model.*dvc repro precompute"):
        workspace.train(tmp_path / "run", base=other)


def test_images_and_scalars_reach_tensorboard(workspace, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    workspace.train(tmp_path, validation={"prompts": ["a red circle", "a blue square"]})
    (events,) = (tmp_path / "runs").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events), size_guidance={"images": 0})
    board.Reload()
    tags = board.Tags()
    train = (
        "loss lr grad_norm param_norm grad_norm_clip param_norm_clip step_time_ms samples_per_sec timestep_mean "
        "timestep_std latent_std noise_std loss_smoothed loss_q1 loss_q2 loss_q3 loss_q4 data_wait peak_memory_gib"
    )
    wanted = {f"train/{name}" for name in train.split()}
    wanted |= {f"validation/loss_{kind}{bin}" for kind in ("raw", "ema") for bin in ("", "_t250", "_t750")}
    assert wanted <= set(tags["scalars"])
    assert set(tags["images"]) == {"validation/sample_0", "validation/sample_1"}
    assert [image.step for image in board.Images("validation/sample_1")] == [2, 4]


def test_the_unet_remembers_the_size_it_was_trained_at(workspace, tmp_path):
    params = workspace.make_params(precompute={"resolution": 128})
    latents = tmp_path / "latents"
    precompute_latents(params.precompute, 0, workspace.base, workspace.dataset, latents, tmp_path / "metrics.json")
    # SD 1.5's version: pipelines set the sample_size of such UNets to 64
    base = workspace.changed_base(tmp_path / "base", "unet/config.json", _diffusers_version="0.6.0")
    run = workspace.train(
        tmp_path / "run", base=base, latents=latents, train={"max_steps": 1}, precompute={"resolution": 128}
    )
    assert load_unet(run.checkpoints / "best" / "raw").config.sample_size == 16
    method, scheduler, _ = load_checkpoint(run.checkpoints / "best", None, base)
    assert method.pipeline(scheduler).unet.config.sample_size == 16


def test_restarts_and_power_reach_the_schedule(workspace, tmp_path):
    steps = {"max_steps": 4, "lr": 1.0e-3, "lr_warmup_steps": 0}
    restarts = workspace.train(
        tmp_path / "r", train={**steps, "lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}
    )
    assert restarts.train_curve.lr.tolist() == pytest.approx([1.0e-3, 0.5e-3, 1.0e-3, 0.5e-3])
    squared = workspace.train(tmp_path / "p", train={**steps, "lr_scheduler": "polynomial", "lr_power": 2.0})
    expected = [(1.0e-3 - 1e-7) * (1 - step / 4) ** 2 + 1e-7 for step in range(4)]
    assert squared.train_curve.lr.tolist() == pytest.approx(expected)


def test_checkpoint_loads_as_a_plain_diffusers_unet(run):
    unet = load_unet(run.checkpoints / "best" / "ema")
    assert not any(p.requires_grad for p in unet.parameters())
    assert unet.dtype == torch.float32

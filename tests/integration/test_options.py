"""What the options of training do, seen from outside: curves, checkpoints, exported schedulers."""

import json

import pandas as pd
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from sdtrain.data.batches import BatchMaker
from sdtrain.export import export_model
from sdtrain.training.curves import Curves
from sdtrain.training.step import optimizer_step

ZERO_TERMINAL = {"prediction_type": "v_prediction", "zero_terminal_snr": True}


def json_of(path) -> dict:
    return json.loads(path.read_text())


def test_zero_terminal_snr_reaches_the_exported_scheduler(workspace, tmp_path):
    run = workspace.train(tmp_path, train={**ZERO_TERMINAL, "max_steps": 2})
    params = workspace.make_params()
    export_model(params.export, workspace.base, run.checkpoints, tmp_path / "model")
    config = json_of(tmp_path / "model" / "scheduler" / "scheduler_config.json")
    assert config["prediction_type"] == "v_prediction"
    assert config["rescale_betas_zero_snr"] is True
    assert config["timestep_spacing"] == "trailing"
    scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "model" / "scheduler")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999, "sampling starts at the timestep without signal"


def test_min_snr_lowers_the_loss_by_its_weights(workspace, run, tmp_path):
    weighted = workspace.train(tmp_path, train={"snr_gamma": 5.0, "max_steps": 1})
    assert weighted.train_curve.loss_q4[0] == pytest.approx(run.train_curve.loss_q4[0])  # SNR < 5: weight 1
    assert weighted.train_curve.loss_q1[0] < run.train_curve.loss_q1[0]


def test_stratified_timesteps_are_spread_over_the_schedule(workspace, tmp_path):
    curve = workspace.train(tmp_path, train={"timestep_sampling": "stratified"}).train_curve
    assert curve.timestep_mean.between(437, 562).all(), "within half a stratum of eight of the middle"
    assert curve.loss_q1.notna().all()


def test_noise_offset_and_perturbation_reach_the_step(workspace, run, tmp_path):
    offset = workspace.train(tmp_path / "o", train={"noise_offset": 1.0, "max_steps": 1}).train_curve
    assert offset.noise_std[0] == pytest.approx(2**0.5, rel=0.2)
    perturbed = workspace.train(tmp_path / "p", train={"input_perturbation": 1.0, "max_steps": 1}).train_curve
    assert perturbed.noise_std[0] == run.train_curve.noise_std[0]
    assert perturbed.loss[0] > 1.2 * run.train_curve.loss[0]


def test_lr_scaling_reaches_the_optimizer(workspace, tmp_path):
    constant = {"lr_scheduler": "constant", "lr": 1e-4, "max_steps": 1}
    scaled = workspace.train(tmp_path, train={**constant, "lr_scaling": "linear", "lr_reference_batch_size": 2})
    assert scaled.train_curve.lr[0] == pytest.approx(4e-4)


def test_piecewise_constant_follows_its_rules(workspace, tmp_path):
    rules = {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:2,0.5:3,0.1", "lr": 1e-4}
    assert workspace.train(tmp_path, train=rules).train_curve.lr.tolist() == pytest.approx([1e-4, 1e-4, 5e-5, 1e-5])


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_attention_backends_agree(workspace, run, tmp_path, backend):
    curve = workspace.train(tmp_path, train={"attention_backend": backend, "max_steps": 2}).train_curve
    assert curve.loss.tolist() == pytest.approx(run.train_curve.loss[:2].tolist(), rel=1e-4)


def test_an_attention_backend_is_used_in_the_step(workspace, tmp_path, monkeypatch):
    """The math path alone calls softmax; the flash kernel never does."""
    called = []
    original = torch.nn.functional.scaled_dot_product_attention

    def attention(*arguments, **keywords):
        called.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
        return original(*arguments, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    workspace.train(tmp_path, train={"attention_backend": "math", "max_steps": 1})
    assert (False, True) in called


def test_the_best_checkpoints_are_kept_in_order(workspace, tmp_path):
    run = workspace.train(
        tmp_path,
        train={"max_steps": 8, "num_best_checkpoints": 3, "lr": 5e-3},
        validation={"every_n_steps": 1},
    )
    curve = run.validation_curve[run.validation_curve.step > 0].sort_values("loss_ema", kind="stable")
    found = {path.name: json_of(path / "training_config.json") for path in run.checkpoints.iterdir()}
    assert set(found) == {"best", "best-2", "best-3", "last"}
    assert [found[name]["step"] for name in ("best", "best-2", "best-3")] == curve.step[:3].tolist()
    assert found["last"]["step"] == 8
    kept = sorted(path.name for path in (tmp_path / "resume").glob("*/checkpoints/*"))
    assert kept == sorted(f"step-{step:08}" for step in curve.step[:3])


def test_early_stopping_ends_the_run_after_its_patience(workspace, tmp_path):
    rising = {"lr": 3e-2, "lr_scheduler": "constant", "max_steps": 20, "use_ema": False}
    settings = {"validation": {"every_n_steps": 1}, "export": {"weights": "raw"}}
    run = workspace.train(tmp_path, train={**rising, "early_stopping_patience": 2}, **settings)
    summary, losses = json_of(run.metrics), run.validation_curve.loss_raw
    assert summary["num_steps"] == summary["best_step"] + 2 < 20
    assert losses.iloc[-2:].min() > losses[summary["best_step"]]
    assert json_of(run.checkpoints / "last" / "training_config.json")["step"] == summary["num_steps"]
    again = workspace.train(tmp_path, train={**rising, "early_stopping_patience": 2}, **settings)
    assert json_of(again.metrics) == summary


@pytest.mark.parametrize(
    "ema",
    [
        {"ema_schedule": "warmup", "ema_inv_gamma": 1.0, "ema_power": 0.75},
        {"ema_schedule": "power_function", "ema_decay": None, "ema_sigma_rel": 0.1},
    ],
)
def test_ema_schedules_give_other_averages(workspace, run, tmp_path, ema):
    other = workspace.train(tmp_path, train=ema)
    assert other.validation_curve.loss_raw.equals(run.validation_curve.loss_raw)
    assert other.validation_curve.loss_ema.iloc[-1] != run.validation_curve.loss_ema.iloc[-1]


@pytest.mark.full  # compiling takes minutes
def test_compiled_training_computes_the_same(workspace, run, tmp_path):
    compiled = workspace.train(tmp_path, train={"compile": True, "max_steps": 2})
    assert compiled.train_curve.loss.tolist() == pytest.approx(run.train_curve.loss[:2].tolist(), rel=1e-4)
    from sdtrain.models.parts import load_unet

    assert load_unet(compiled.checkpoints / "last" / "raw").config.sample_size == 8


class CountReads(TorchDispatchMode):
    """Counts how often a number is read off a tensor, which on a GPU waits for it."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            CountReads.reads += 1
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_off_the_device_between_logging_intervals(workspace, tmp_path, monkeypatch):
    from sdtrain import train as train_module

    reads = []
    make = BatchMaker.make

    def make_uncounted(self, *arguments):  # works in the host's memory; safetensors reads its storages there
        before = CountReads.reads
        batch = make(self, *arguments)
        CountReads.reads = before
        return batch

    def step(*arguments):
        CountReads.reads = 0
        with CountReads():
            report = optimizer_step(*arguments)
        reads.append(CountReads.reads)
        return report

    def note(self, report, original=Curves.add_step):
        with CountReads():
            original(self, report)
        reads[-1] += CountReads.reads

    monkeypatch.setattr(BatchMaker, "make", make_uncounted)
    monkeypatch.setattr(train_module, "optimizer_step", step)
    monkeypatch.setattr(Curves, "add_step", note)
    workspace.train(tmp_path, train={"log_every_n_steps": 4, "micro_batch_size": 4})
    assert reads == [0, 0, 0, 0]


def test_the_curves_measure_what_they_say(workspace, run, tmp_path):
    """One interval over four steps is the mean of four intervals of one."""
    whole = workspace.train(tmp_path, train={"log_every_n_steps": 4}).train_curve.iloc[0]
    parts = run.train_curve
    assert whole.step == 4
    for name in ("loss", "grad_norm", "grad_norm_clip", "timestep_mean"):
        assert whole[name] == pytest.approx(parts[name].mean(), rel=1e-6), name
    for name in ("loss_smoothed", "lr", "param_norm", "param_norm_clip"):
        assert whole[name] == pytest.approx(parts[name].iloc[-1], rel=1e-6), name
    assert parts.param_norm[1:].tolist() == parts.param_norm_clip[:-1].tolist()
    assert (parts.grad_norm_clip <= 1.0).all()
    assert (parts.grad_norm_clip <= parts.grad_norm + 1e-9).all()
    assert parts.noise_std.mean() == pytest.approx(1.0, abs=0.05)
    weights = [0.99**age for age in range(4)][::-1]
    smoothed = sum(w * loss for w, loss in zip(weights, parts.loss, strict=True)) / sum(weights)
    assert parts.loss_smoothed.iloc[-1] == pytest.approx(smoothed)


def test_quartiles_are_the_loss_split_by_timestep(workspace, tmp_path):
    row = workspace.train(tmp_path, train={"log_every_n_steps": 4, "timestep_sampling": "stratified"}).train_curve.iloc[
        0
    ]
    assert row[["loss_q1", "loss_q2", "loss_q3", "loss_q4"]].mean() == pytest.approx(row.loss, rel=0.1)
    assert row.loss_q1 > row.loss_q2 > row.loss_q4, "the less noise, the harder it is to tell"


def test_speed_has_its_own_table(run):
    speed = pd.read_csv(run.metrics.with_name("train_speed.csv"))
    columns = "step step_time_ms samples_per_sec data_wait peak_memory_gib num_processes micro_batch_size"
    assert list(speed) == columns.split()
    assert set(zip(speed.num_processes, speed.micro_batch_size, strict=True)) == {(1, 8)}
    assert speed.step.tolist() == [1, 2, 3, 4]
    assert speed.data_wait.between(0, 1).all()
    assert (speed.samples_per_sec * speed.step_time_ms).tolist() == pytest.approx([8000.0] * 4)
    assert speed.peak_memory_gib.between(0.1, 100).all()

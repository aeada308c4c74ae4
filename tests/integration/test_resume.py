"""A run that was stopped and taken up again is the run that was never stopped, to the bit."""

import dataclasses
import json
import os
import re
import shutil
import signal

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtrain import train as train_module
from sdtrain.data.batches import BatchMaker
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import seal_folder
from sdtrain.training.branching import find_origin
from sdtrain.training.optimizer import build_optimizer
from sdtrain.training.state_files import flat_state, nested_state, read_head
from sdtrain.training.states import StateStore

STEPS = {"max_steps": 6, "save_every_n_steps": 2, "log_every_n_steps": 4}
OPEN = {**STEPS, "lr_scheduler": "constant"}


def stopped_after(monkeypatch, steps: int, number: int = signal.SIGTERM):
    """Send this process a signal in the middle of the step that makes it `steps`."""
    original, made = BatchMaker.make, []

    def make(self, step, *arguments):
        made.append(step)
        if len(made) == steps + 1:  # the first looks at the latents before training
            os.kill(os.getpid(), number)
        return original(self, step, *arguments)

    monkeypatch.setattr(BatchMaker, "make", make)


def killed_in(monkeypatch, name: str, call: int):
    """Raise in the middle of the `call`-th call of a function that the loop calls, as SIGKILL would end it."""
    original, calls = getattr(train_module, name), []

    def function(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call:
            raise MemoryError("killed")
        return original(*arguments, **keywords)

    monkeypatch.setattr(train_module, name, function)


def states_in(out) -> list:
    """Oldest first."""
    return sorted(path for path in (out / "resume").glob("*/step-*") if path.suffix == "")


def newest(out):
    return states_in(out)[-1]


def files_of(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def state_of(out) -> dict[str, bytes]:
    """The last saved state; left out are measured times and what names the run or its length when it was saved."""
    files = files_of(newest(out))
    head = json.loads(files.pop("state.json"))
    del files["SHA256SUMS"], head["log"]["speed_rows"], head["run_name"], head["checkpoints"]
    return {**files, "head": json.dumps(head).encode()}


def assert_same(out, reference) -> None:
    assert files_of(out / "checkpoints") == files_of(reference / "checkpoints")
    for name in ("train.json", "train.csv", "validation.csv"):
        assert (out / name).read_bytes() == (reference / name).read_bytes(), name
    assert state_of(out) == state_of(reference)


@pytest.fixture(scope="module")
def whole(workspace, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    workspace.train(out, train=STEPS)
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_a_signal_ends_the_step_saves_and_exits(workspace, whole, tmp_path, monkeypatch, capfd, steps, number):
    with monkeypatch.context() as patch:
        stopped_after(patch, steps, number)
        with pytest.raises(SystemExit) as stopped:
            workspace.train(tmp_path, train=STEPS)
    assert stopped.value.code == 128 + number
    assert f"stopped by {number.name} after step {steps} of 6" in capfd.readouterr().err
    saved = sorted({0, steps, (steps - 1) // 2 * 2} - {0})  # at the signal, and on schedule before it
    assert [path.name for path in states_in(tmp_path)] == [f"step-{step:08}" for step in saved]
    assert not (tmp_path / "checkpoints").exists()
    workspace.train(tmp_path, train=STEPS)
    assert f"resumes from step {steps} of 6" in capfd.readouterr().out
    assert_same(tmp_path, whole)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("optimizer_step", 2),  # before anything was saved
        ("optimizer_step", 4),
        ("validate", 2),
        ("save", 2),
        ("save_checkpoint", 2),
        ("write_outs", 1),
        ("write_json", 1),
    ],
)
def test_a_kill_anywhere_loses_nothing_but_time(workspace, whole, tmp_path, monkeypatch, function, call):
    with monkeypatch.context() as patch:
        killed_in(patch, function, call)
        with pytest.raises(MemoryError):
            workspace.train(tmp_path, train=STEPS)
    workspace.release_locks()
    workspace.train(tmp_path, train=STEPS)
    assert_same(tmp_path, whole)


def test_a_kill_within_a_save_leaves_the_state_before_it(workspace, whole, tmp_path, monkeypatch):
    from sdtrain.training import states

    with monkeypatch.context() as patch:
        original, calls = states.save_file, []

        def save_file(tensors, path):
            calls.append(path)
            original(tensors, path)
            if len(calls) == 5:  # the second state's second file
                os.truncate(path, 100)
                raise KeyboardInterrupt

        patch.setattr(states, "save_file", save_file)
        patch.setattr("sdtrain.ground.files.shutil.rmtree", lambda *_, **__: None)  # a killed process tidies nothing
        with pytest.raises(KeyboardInterrupt):
            workspace.train(tmp_path, train=STEPS)
    assert list((tmp_path / "resume").glob("*/step-00000004.partial"))
    workspace.release_locks()
    workspace.train(tmp_path, train=STEPS)
    assert_same(tmp_path, whole)


def test_a_finished_run_is_written_again_without_training(workspace, whole, tmp_path, monkeypatch):
    shutil.copytree(whole / "resume", tmp_path / "resume")
    monkeypatch.setattr(train_module, "optimizer_step", lambda *_: pytest.fail("it trains again"))
    workspace.train(tmp_path, train=STEPS)
    assert_same(tmp_path, whole)


def test_never_starts_over(workspace, whole, tmp_path, capfd):
    shutil.copytree(whole / "resume", tmp_path / "resume")
    workspace.train(tmp_path, train={**STEPS, "resume": "never"})
    out = capfd.readouterr().out
    assert "resumes from" not in out
    assert "step 0: held-out loss" in out


@pytest.mark.parametrize("schedule", ["constant", pytest.param("constant_with_warmup", marks=pytest.mark.full)])
def test_a_longer_run_goes_on_from_the_shorter_one(workspace, tmp_path, schedule):
    """Though the shorter one validated and logged at its own end, which the longer one doesn't."""
    steps = {**STEPS, "lr_scheduler": schedule, "lr_warmup_steps": 2 if "warmup" in schedule else 0}
    workspace.train(tmp_path / "longer", train={**steps, "max_steps": 5})
    workspace.train(tmp_path / "longer", train={**steps, "max_steps": 8})
    workspace.train(tmp_path / "whole", train={**steps, "max_steps": 8})
    config = json.loads((tmp_path / "longer" / "checkpoints" / "last" / "training_config.json").read_text())
    assert config["step"] == 8
    assert_same(tmp_path / "longer", tmp_path / "whole")


def test_a_schedule_that_depends_on_its_length_says_so(workspace, whole, tmp_path, capfd):
    shutil.copytree(whole / "resume", tmp_path / "resume")
    workspace.train(tmp_path, train={**STEPS, "max_steps": 7})
    assert "num_steps 6 there, 7 here, on which every step's learning rate depends" in capfd.readouterr().out


def test_a_state_of_other_params_says_what_differs(workspace, whole, tmp_path, capfd):
    shutil.copytree(whole / "resume", tmp_path / "resume")
    workspace.train(tmp_path, train={**STEPS, "snr_gamma": 5.0}, validation={"max_samples": 3})
    out = capfd.readouterr().out
    assert "isn't used, because it differs: train.snr_gamma None there, 5.0 here; validation.max_samples 4" in out


def test_params_that_change_no_weight_keep_the_state(workspace, whole, tmp_path, capfd):
    shutil.copytree(whole / "resume", tmp_path / "resume")
    workspace.train(
        tmp_path,
        train={**STEPS, "micro_batch_size": 4, "num_saved_runs": 9, "save_every_n_steps": 3, "trackers": []},
        validation={"batch_size": 32},
    )
    assert "resumes from step 6 of 6" in capfd.readouterr().out


def test_a_finished_run_that_is_taken_over_says_so_and_records_what_ran(workspace, whole, tmp_path, capfd):
    """As `dvc exp run -S train.micro_batch_size=4` after a finished run: nothing trains, and nothing says it did."""
    shutil.copytree(whole / "resume", tmp_path / "resume")
    run = workspace.train(tmp_path, train={**STEPS, "micro_batch_size": 4})
    out = capfd.readouterr().out
    assert "was already trained to its end (6 steps): that result is used and nothing is trained" in out
    assert "(train.micro_batch_size 8 there, 4 here: no effect); to train it again, set train.resume: never" in out
    for path in run.checkpoints.glob("*/training_config.json"):
        assert json.loads(path.read_text())["params"]["train"]["micro_batch_size"] == 8
    assert pd.read_csv(tmp_path / "train_speed.csv").micro_batch_size.unique().tolist() == [8]


def test_a_run_that_moves_to_another_split_records_both(workspace, tmp_path, monkeypatch):
    steps = {**STEPS, "log_every_n_steps": 1}
    with monkeypatch.context() as patch:
        stopped_after(patch, 4)
        with pytest.raises(SystemExit):
            workspace.train(tmp_path, train=steps)
    run = workspace.train(tmp_path, train={**steps, "micro_batch_size": 4})
    speed = pd.read_csv(tmp_path / "train_speed.csv")
    assert dict(zip(speed.step, speed.micro_batch_size, strict=True)) == {1: 8, 2: 8, 3: 8, 4: 8, 5: 4, 6: 4}
    assert speed.num_processes.unique().tolist() == [1]
    config = json.loads((run.checkpoints / "last" / "training_config.json").read_text())
    assert config["params"]["train"]["micro_batch_size"] == 4


def test_a_shorter_run_leaves_the_longer_ones_states_usable(workspace, tmp_path, capfd):
    """Six steps, then four, then six again: the last state of the first is used, and nothing is trained."""
    steps = {**OPEN, "save_every_n_steps": 2}
    first = workspace.train(tmp_path, train={**steps, "max_steps": 6})
    name = "last/raw/diffusion_pytorch_model.safetensors"
    weights = (first.checkpoints / name).read_bytes()
    shorter = workspace.train(tmp_path, train={**steps, "max_steps": 4})
    config = json.loads((shorter.checkpoints / "last" / "training_config.json").read_text())
    assert config["step"] == config["num_steps"] == config["params"]["train"]["max_steps"] == 4
    assert "no effect" not in capfd.readouterr().out
    again = workspace.train(tmp_path, train={**steps, "max_steps": 6})
    assert "resumes from step 6 of 6" in capfd.readouterr().out
    assert (again.checkpoints / name).read_bytes() == weights
    assert not list((tmp_path / "resume").rglob("*.damaged*"))


def test_a_second_trainer_of_the_same_run_is_refused(workspace, whole, tmp_path):
    shutil.copytree(whole / "resume", tmp_path / "resume")
    (folder,) = (path for path in (tmp_path / "resume").iterdir() if path.is_dir())
    store = StateStore(tmp_path / "resume", read_head(newest(tmp_path)).identity)
    assert store.folder == folder
    store.lock()
    with pytest.raises(InputError, match=rf"another process is already training this run \(pid {os.getpid()} on"):
        workspace.train(tmp_path, train=STEPS)
    store.unlock()
    workspace.train(tmp_path, train=STEPS)


def from_(source) -> dict:
    return {"resume": "branch", "branch_from": str(source)}


def branch(workspace, whole, out, source=None, **changes):
    return workspace.train(out, train={**STEPS, "max_steps": 8, **from_(source or newest(whole)), **changes})


def test_a_branch_with_a_reset_schedule_records_it(workspace, whole, tmp_path, capfd):
    run = branch(workspace, whole, tmp_path, resume_reset=["scheduler", "lr"], lr=1.0e-3, log_every_n_steps=1)
    assert "branches from step 6 of" in capfd.readouterr().out
    config = json.loads((run.checkpoints / "last" / "training_config.json").read_text())
    assert config["resumed_from"]["step"] == 6
    assert config["resumed_from"]["reset"] == ["lr", "scheduler"]
    assert "train.lr 0.002 there, 0.001 here" in config["resumed_from"]["differences"]
    assert run.train_curve.step.tolist() == [7, 8]
    assert run.train_curve.lr.tolist() == pytest.approx([1.0e-3, 0.5e-3]), "a cosine over the two steps left"


def test_a_branch_without_changes_goes_on_exactly(workspace, tmp_path):
    """From a state of its own past, under another seed of nothing: only the origin's name differs."""
    workspace.train(tmp_path / "a", train={**OPEN, "max_steps": 4})
    branched = workspace.train(tmp_path / "b", train={**OPEN, **from_(newest(tmp_path / "a"))})
    whole = workspace.train(tmp_path / "c", train=OPEN)
    name = "last/ema/diffusion_pytorch_model.safetensors"
    assert (branched.checkpoints / name).read_bytes() == (whole.checkpoints / name).read_bytes()


def test_what_a_branch_starts_from_counts_by_its_content(workspace, tmp_path):
    """Two states of the same run and step whose weights differ make two branches."""
    source, origins = tmp_path / "start", []
    workspace.train(tmp_path / "a", train={**OPEN, "max_steps": 4})
    for changed in (False, True):
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(newest(tmp_path / "a"), source)
        if changed:
            tensors = load_file(source / "weights.safetensors")
            save_file({name: tensor + 1 for name, tensor in tensors.items()}, source / "weights.safetensors")
            seal_folder(source)
        params = workspace.make_params(train={**OPEN, **from_(source)})
        origins.append(find_origin(params.train, tmp_path / "out", 6).record())
    assert origins[0] != origins[1]
    assert {**origins[0], "sha256": None} == {**origins[1], "sha256": None}


def test_a_stopped_branch_is_resumed_as_a_branch(workspace, whole, tmp_path, monkeypatch):
    reset = {"resume_reset": ["lr", "optimizer", "scheduler"], "lr": 1.0e-3}
    branch(workspace, whole, tmp_path / "whole", **reset)
    with monkeypatch.context() as patch:
        stopped_after(patch, 1)
        with pytest.raises(SystemExit):
            branch(workspace, whole, tmp_path / "stopped", **reset)
    branch(workspace, whole, tmp_path / "stopped", **reset)
    assert_same(tmp_path / "stopped", tmp_path / "whole")


def test_a_branch_from_a_checkpoint_starts_at_its_weights(workspace, whole, tmp_path):
    source = tmp_path / "copied"
    shutil.copytree(whole / "checkpoints" / "last", source)
    with pytest.raises(InputError, match="is a checkpoint, which keeps no optimizer state; add optimizer to"):
        branch(workspace, whole, tmp_path / "x", source, resume_reset=["scheduler"])
    run = branch(workspace, whole, tmp_path / "y", source, resume_reset=["scheduler", "optimizer"], log_every_n_steps=1)
    assert run.validation_curve.step.tolist() == [0, 6, 8]
    before = json.loads((whole / "train.json").read_text())
    last = json.loads((source / "training_config.json").read_text())
    assert run.validation_curve.loss_ema[1] == pytest.approx(last["validation_loss"]["ema"], rel=1e-6)
    assert run.validation_curve.loss_raw[0] == before["base_validation_loss"]
    assert json.loads((run.checkpoints / "last" / "training_config.json").read_text())["ema_step"] == 8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 1.0e-3}, "train.lr 0.002 there, 0.001 here; add lr to train.resume_reset"),
        ({}, "num_steps 6 there, 8 here.*add scheduler to train.resume_reset"),
        ({"adam_beta2": 0.9}, "train.adam_beta2 0.99 there, 0.9 here; add optimizer to train.resume_reset"),
        ({"max_steps": 6}, "is at step 6, and the run ends at 6; raise train.max_steps"),
    ],
)
def test_a_branch_that_misfits_is_refused(workspace, whole, tmp_path, changes, says):
    reset = ["scheduler"] if changes else []
    with pytest.raises(InputError, match=says):
        branch(workspace, whole, tmp_path, resume_reset=reset, **changes)


def test_what_cannot_be_branched_from_is_explained(workspace, whole, tmp_path):
    with pytest.raises(InputError, match="no such folder; give a saved state or a checkpoint"):
        branch(workspace, whole, tmp_path, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has neither a saved state nor a checkpoint"):
        branch(workspace, whole, tmp_path, tmp_path / "empty")
    with pytest.raises(InputError, match="which DVC deletes before this stage runs; run `dvc checkout`, copy"):
        branch(workspace, whole, tmp_path, tmp_path / "checkpoints" / "last")


def test_a_non_finite_loss_leaves_the_last_good_state(workspace, tmp_path):
    rates = {"lr": 1.0e30, "lr_scheduler": "piecewise_constant", "lr_step_rules": "1e-34:3,1"}
    explosive = {**STEPS, **rates, "max_grad_norm": None, "max_steps": 40, "log_every_n_steps": 2}
    with pytest.raises(InputError, match=r"between steps \d+ and \d+; the last good state is") as caught:
        workspace.train(tmp_path, train=explosive)
    folder = re.search(r"state is (\S+):", str(caught.value))[1]
    assert newest(tmp_path).samefile(folder)
    assert read_head(newest(tmp_path)).step == 2
    assert "between steps 3 and 4;" in str(caught.value)


def test_a_branch_point_inside_another_run_is_not_pruned(workspace, whole, tmp_path):
    shutil.copytree(whole / "resume", tmp_path / "resume")
    source = next((tmp_path / "resume").glob("*/checkpoints/step-*"))
    reset = {"resume_reset": ["optimizer", "scheduler"], "num_saved_runs": 1}
    branch(workspace, whole, tmp_path, source, **reset)
    assert source.exists()


def test_a_branch_that_adds_an_average_starts_it_at_its_weights(workspace, tmp_path):
    raw = {"export": {"weights": "raw"}}
    workspace.train(tmp_path / "a", train={**OPEN, "max_steps": 4, "use_ema": False}, **raw)
    start = {**OPEN, **from_(newest(tmp_path / "a"))}
    curve = workspace.train(tmp_path / "b", train=start).validation_curve
    assert curve.step.tolist() == [0, 4, 6]
    assert curve.loss_ema[1] == curve.loss_raw[1] != curve.loss_raw[0]


def test_a_longer_run_rewrites_what_its_best_checkpoints_say_of_it(workspace, tmp_path):
    steps = {**OPEN, "num_best_checkpoints": 3}
    workspace.train(tmp_path, train={**steps, "max_steps": 4})
    longer = workspace.train(tmp_path, train={**steps, "max_steps": 8})
    configs = [json.loads(path.read_text()) for path in longer.checkpoints.glob("*/training_config.json")]
    assert {config["num_steps"] for config in configs} == {config["params"]["train"]["max_steps"] for config in configs}
    assert {config["num_steps"] for config in configs} == {8}


def test_a_refused_run_has_deleted_nothing(workspace, whole, tmp_path):
    shutil.copytree(whole / "resume", tmp_path / "resume")
    before = files_of(tmp_path / "resume")
    with pytest.raises(InputError, match="needs a GPU"):
        workspace.train(tmp_path, train={**STEPS, "resume": "never", "attention_backend": "cudnn"})
    assert {name: data for name, data in files_of(tmp_path / "resume").items() if name in before} == before


def test_a_state_beyond_the_end_is_named(workspace, tmp_path, capfd):
    rarely = {**OPEN, "save_every_n_steps": 10}
    workspace.train(tmp_path, train={**rarely, "max_steps": 4})
    workspace.train(tmp_path, train={**rarely, "max_steps": 2})
    assert "step-00000004 isn't used: it is beyond the run's last step" in capfd.readouterr().out


def test_a_warmup_longer_than_what_a_new_schedule_has_left_is_refused(workspace, whole, tmp_path):
    with pytest.raises(InputError, match="lr_warmup_steps = 2: must be below the 2 steps that the learning rate's"):
        branch(workspace, whole, tmp_path, resume_reset=["scheduler"], lr_warmup_steps=2)


def test_an_optimizer_state_of_any_shape_survives_the_disk():
    """As 8-bit AdamW's: nested, with numbers, and with one table shared by all parameters."""
    table = torch.arange(4.0)
    state = {number: {"step": 3, "quant": {"qmap1": table, "absmax": torch.ones(2)}} for number in (0, 1)}
    tensors, scalars = flat_state(state)
    again = nested_state({**tensors, **json.loads(json.dumps(scalars))})
    assert again["1"]["step"] == 3
    assert torch.equal(again["0"]["quant"]["qmap1"], table)
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)


def test_steps_that_fp16_skips_are_counted_and_change_no_curve(workspace, tmp_path, monkeypatch):
    """No GPU is here: the second step's gradient is made infinite, and the scaler's answer with it."""
    original = train_module.optimizer_step

    def step(s, lr_scheduler, number):
        report = original(s, lr_scheduler, number)
        if number != 1:
            return report
        return dataclasses.replace(
            report, grad_norm=torch.tensor(torch.inf), sums=report.sums * torch.nan, skipped=True
        )

    monkeypatch.setattr(train_module, "optimizer_step", step)
    run = workspace.train(tmp_path, train={**STEPS, "save_every_n_steps": 1, "log_every_n_steps": 3})
    assert json.loads(run.metrics.read_text())["num_skipped_steps"] == 1
    assert run.train_curve[["loss", "grad_norm", "timestep_mean"]].notna().all(axis=None)


def test_a_skipped_step_at_the_end_of_an_interval_leaves_the_weights_norm(workspace, tmp_path, monkeypatch):
    original = train_module.optimizer_step

    def step(trainer, lr_scheduler, number):
        report = original(trainer, lr_scheduler, number)
        if number != 2:
            return report
        return dataclasses.replace(report, grad_norm=torch.tensor(torch.nan), skipped=True)

    monkeypatch.setattr(train_module, "optimizer_step", step)
    curve = workspace.train(tmp_path, train={**STEPS, "max_steps": 4, "log_every_n_steps": 3}).train_curve
    assert curve.param_norm_clip[0] == pytest.approx(curve.param_norm[1], rel=1e-3), "of the weights, not 0"
    assert curve[["param_norm", "param_norm_clip"]].min(axis=None) > 1


def test_fp16_takes_the_optimizer_that_tells_of_skipped_steps(workspace):
    layer = torch.nn.Linear(2, 2)
    all_params = [workspace.make_params(train={"precision": name}).train for name in ("fp32", "bf16", "fp16")]
    optimizers = [build_optimizer(layer.parameters(), params, torch.device("cpu")) for params in all_params]
    assert [optimizer.defaults["fused"] for optimizer in optimizers] == [True, True, False]

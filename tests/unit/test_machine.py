"""What the machine can't do is refused by the first stage that runs."""

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch
import yaml

from sdtrain.ground.errors import InputError
from sdtrain.params.machine import check_device, check_machine, count_micro_batches, count_processes
from stages import lease
from tests.conftest import ROOT, shrunk_tree

UP_TO_TRAIN = ["base", "dataset", "precompute", "train"]
AFTER = ["export", "sample", "evaluate"]
FP16 = "train.precision = 'fp16': needs a CUDA GPU, and there is none; use 'bf16' or 'fp32'"


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this machine look like another: its GPUs, packages, compilers and environment."""
    for name in ("NPROC", "NNODES", "WORLD_SIZE", "CXX"):
        monkeypatch.delenv(name, raising=False)
    found = importlib.util.find_spec

    def look_like(num_gpus=0, bf16=True, lacks=(), has=(), programs=("g++", "clang++"), **environment):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: num_gpus > 0)
        specs = {**dict.fromkeys(lacks), **{name: found("torch") for name in has}}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: specs[name] if name in specs else found(name))
        monkeypatch.setattr(shutil, "which", lambda name: name if name in programs else None)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return look_like


CASES = [
    ({"precision": "fp16"}, {}, FP16),
    ({"precision": "bf16"}, {"num_gpus": 1, "bf16": False}, "train.precision = 'bf16': this GPU doesn't support it"),
    ({"optimizer": "adamw_8bit"}, {"has": ["bitsandbytes"]}, "train.optimizer = 'adamw_8bit': needs a CUDA GPU, this "),
    (
        {"optimizer": "adamw_8bit"},
        {"num_gpus": 1, "lacks": ["bitsandbytes"]},
        "train.optimizer = 'adamw_8bit': bitsandbytes isn't installed; run `pip install '.[8bit]'`, or use 'adamw'",
    ),
    (
        {"attention_backend": "cudnn"},
        {},
        "train.attention_backend = 'cudnn': needs a GPU; on a CPU there are auto, fla",
    ),
    ({"attention_backend": "efficient"}, {}, "train.attention_backend = 'efficient': needs a GPU"),
    (
        {"attention_backend": "flash"},
        {"num_gpus": 1},
        "train.attention_backend = 'flash': on a GPU that kernel computes in 16 bit only, and train.precision = 'fp32'",
    ),
    (
        {"compile": True},
        {"programs": []},
        "train.compile = True: torch.compile needs a C++ compiler, and '",
    ),
    (
        {"compile": True},
        {"CXX": "icpx"},
        "train.compile = True: torch.compile needs a C++ compiler, and 'icpx' wasn't found; install it, set CXX",
    ),
    (
        {"trackers": ["wandb"]},
        {"lacks": ["wandb"]},
        "train.trackers: wandb isn't installed; run `pip install '.[wandb]",
    ),
    ({}, {"NPROC": "two"}, "NPROC = 'two': must be a whole number of 1 or more"),
    ({}, {"NPROC": "0"}, "NPROC = '0': must be a whole number of 1 or more"),
    ({}, {"NPROC": "²"}, "NPROC = '²': must be a whole number of 1 or more"),
    ({}, {"NNODES": "1.5"}, "NNODES = '1.5': must be a whole number of 1 or more"),
    (
        {},
        {"NPROC": "2"},
        "train.batch_size = 8: can't be split into micro-batches of 8 on 2 processes; take a multiple",
    ),
    ({"micro_batch_size": 2}, {"NPROC": "2", "NNODES": "3"}, "train.batch_size = 8: can't be split into micro-batches"),
    (
        {"micro_batch_size": 2},
        {"NPROC": "4", "num_gpus": 2},
        "NPROC = 4: each process needs its own CUDA GPU, and this machine has 2; lower NPROC",
    ),
]


@pytest.mark.parametrize(("train", "like", "fault"), CASES)
def test_what_the_machine_lacks_is_refused(make_params, machine, train, like, fault):
    machine(**like)
    with pytest.raises(InputError) as caught:
        check_machine(make_params(train=train).train)
    assert str(caught.value).startswith(fault)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "like"),
    [
        ({}, {"programs": [], "lacks": ["wandb", "bitsandbytes"]}),
        ({"precision": "fp16"}, {"num_gpus": 1}),
        ({"precision": "bf16"}, {"num_gpus": 1}),
        ({"precision": "bf16"}, {"bf16": False}),
        ({"optimizer": "adamw_8bit"}, {"num_gpus": 1, "has": ["bitsandbytes"]}),
        ({"attention_backend": "flash"}, {}),
        ({"attention_backend": "math"}, {"num_gpus": 1}),
        ({"attention_backend": "cudnn", "precision": "bf16"}, {"num_gpus": 1}),
        ({"compile": True}, {}),
        ({"compile": True}, {"programs": ["icpx"], "CXX": "icpx"}),
        ({"trackers": ["wandb"]}, {"has": ["wandb"]}),
        ({"micro_batch_size": 2}, {"NPROC": "2", "NNODES": "2", "num_gpus": 2}),
        ({"micro_batch_size": 2}, {"NPROC": "4"}),
    ],
)
def test_what_the_machine_has_passes(make_params, machine, train, like):
    machine(**like)
    check_machine(make_params(train=train).train)


def test_all_that_is_lacking_is_told_at_once(make_params, machine):
    machine(NPROC="3", programs=[], lacks=["wandb"])
    asked = {"precision": "fp16", "optimizer": "adamw_8bit", "compile": True, "trackers": ["wandb"]}
    with pytest.raises(InputError) as caught:
        check_machine(make_params(train=asked).train)
    starts = ["train.batch_size", "train.compile", "train.precision", "train.optimizer", "train.trackers"]
    for line, start in zip(str(caught.value).split("\n"), starts, strict=True):
        assert line.startswith(start)


def test_a_run_that_was_sent_to_the_cpu_is_held_against_that(make_params, machine):
    machine(num_gpus=1, has=["bitsandbytes"])
    params = make_params(train={"optimizer": "adamw_8bit"}).train
    check_device(params)
    with pytest.raises(InputError, match="this run is on the cpu"):
        check_device(params, "cpu")


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, 1),
        ({"NPROC": "4"}, 4),
        ({"NPROC": "4", "NNODES": "2"}, 8),
        ({"NNODES": "2"}, 2),
        ({"WORLD_SIZE": "3"}, 3),
        ({"NPROC": "2", "NNODES": "2", "WORLD_SIZE": "3"}, 4),  # another number than was asked for is found later
        ({"NNODES": "2", "WORLD_SIZE": "8"}, 8),  # torchrun by hand
    ],
)
def test_count_processes(machine, environment, number):
    machine(**environment)
    assert count_processes() == number


def test_micro_batches_make_up_the_batch(make_params):
    params = make_params(train={"batch_size": 24, "micro_batch_size": 2}).train
    assert [count_micro_batches(params, num_processes) for num_processes in (1, 3, 12)] == [12, 4, 1]


def ask_for_fp16(folder, **changes) -> None:
    tree = shrunk_tree(train={"precision": "fp16"}, base={"path": str(ROOT / "data" / "builtin")}, **changes)
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))


def test_the_first_stage_refuses_before_it_makes_anything(tmp_path):
    ask_for_fp16(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "stages.base"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == f"error: {FP16}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize("stage", UP_TO_TRAIN)
def test_every_stage_up_to_train_refuses(stage, machine, tmp_path, monkeypatch):
    ask_for_fp16(tmp_path)
    machine()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        import_module(f"stages.{stage}").main()
    assert str(caught.value) == FP16
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize("stage", AFTER)
def test_what_was_trained_elsewhere_is_used_anywhere(stage, machine, tmp_path, monkeypatch):
    """They get as far as looking for their inputs."""
    ask_for_fp16(tmp_path)
    machine()
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InputError, OSError), match=r"data/(base|checkpoints|model)"):
        import_module(f"stages.{stage}").main()


def test_checking_the_shipped_params_imports_no_torch():
    """`base` and `dataset` start in a second."""
    code = (
        "import sys, stages; from pathlib import Path; from sdtrain.params.machine import load_trainable_params\n"
        "load_trainable_params(Path('params.yaml')); sys.exit('torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("NPROC", "NNODES")}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment).returncode == 0


def test_every_process_of_this_machine_gets_a_gpu_before_cuda_is_asked(make_params, machine, monkeypatch, tmp_path):
    """And CUDA then shows the leased ones alone."""
    machine(num_gpus=8, NPROC="4", NNODES="2")
    monkeypatch.setattr(lease, "lease_gpus", lambda num: machine(num_gpus=num, NPROC="4", NNODES="2"))
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(shrunk_tree(train={"batch_size": 8, "micro_batch_size": 1})))
    lease.load_params_and_lease(path)
    assert torch.cuda.device_count() == 4

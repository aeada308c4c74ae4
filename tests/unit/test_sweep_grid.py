"""A sweep's tasks: how values are read, named and written for DVC, and what is refused before anything runs."""

import json
import re
import subprocess

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from sdtrain.ground.errors import InputError
from sdtrain.params.load import load_params
from sdtrain.tools.sweep.grid import parse_assignment, plan_tasks
from tests.conftest import ROOT

PARAMS = ROOT / "params.yaml"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("train.lr=1e-4,2.5e-4", [1e-4, 2.5e-4]),
        ("train.seed=0..4", [0, 1, 2, 3, 4]),
        ("train.seed=7,0..2, 9", [7, 0, 1, 2, 9]),
        ("train.seed=3..3", [3]),
        ("x.y=-1..1", [-1, 0, 1]),
        ("train.snr_gamma=null,5.0", [None, 5.0]),
        ("train.compile=true,false", [True, False]),
        ("train.trackers=[],[tensorboard, wandb]", [[], ["tensorboard", "wandb"]]),
        ("x.y='a,b',\"c,d\",''", ["a,b", "c,d", ""]),
        ("x.y=[['a]',1],2]", [[["a]", 1], 2]]),
        ("x.y=it's,no", ["it's", "no"]),
        ("x.y=a=b", ["a=b"]),
        ('x.y="a\\",b",c', ['a",b', "c"]),
    ],
)
def test_values_are_read_as_in_the_params_file(text, values):
    key, found = parse_assignment(text)
    assert key == text.partition("=")[0]
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr", "'train.lr': expected key=value,value…"),
        ("=1", "'=1': expected key=value,value…"),
        ("train..lr=1", "'train..lr=1': expected key=value,value…"),
        ("train.lr=", "'train.lr=': a value is empty; write null"),
        ("train.lr=1,,2", "'train.lr=1,,2': a value is empty; write null"),
        ("train.seed=4..0", "'train.seed=4..0': the range 4..0 ends before it begins; write 0..4"),
        ("train.seed=0..", "'train.seed=0..': 0.. isn't a range; write both ends as whole numbers, e.g. 0..4"),
        ("train.lr=0.5..2", "0.5..2 isn't a range; write both ends"),
        (
            "method={name: lora}",
            "'method={name: lora}': {name: lora} is a mapping; give its keys one by one, e.g. method.na",
        ),
        ("train.lr=[1", "train.lr=[1: not valid YAML"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_assignment(text)


def test_tasks_are_the_product_and_have_the_params_that_will_run():
    tasks = plan_tasks(["train.lr=1e-4,2e-4", "train.seed=0..2"], PARAMS)
    assert [task.name for task in tasks] == [f"lr-{lr}-seed-{seed}" for lr in (0.0001, 0.0002) for seed in range(3)]
    assert [(task.params.train.lr, task.params.train.seed) for task in tasks] == [
        (lr, seed) for lr in (1e-4, 2e-4) for seed in range(3)
    ]
    shipped = load_params(PARAMS)
    for task in tasks:
        same = task.params.train.model_copy(update={"lr": shipped.train.lr, "seed": shipped.train.seed})
        assert task.params.model_copy(update={"train": same}) == shipped
    assert tasks[1].overrides == ("train.lr=0.0001", "train.seed=1")


@pytest.mark.parametrize(
    ("assignments", "prefix", "name"),
    [
        (["train.lr=1e-5"], "wide", "wide-lr-1e-05"),
        (["seed=1", "train.seed=2"], None, "seed-1-train-seed-2"),
        (["train.snr_gamma=null"], None, "snr_gamma-null"),
        (["train.resume_reset=[]"], None, "resume_reset-4f53cd"),
        (["train.trackers=[wandb]"], None, "trackers-wandb-c44318"),
        (["sample.negative_prompt='blurry, dark: ~^?*'"], None, "negative_prompt-blurry-dark-351494"),
        (["sample.negative_prompt=a..b.lock"], None, "negative_prompt-a-b-lock-86ceb9"),
    ],
)
def test_names_are_readable_and_valid_git_refs(assignments, prefix, name):
    """What doesn't fit is told apart by the first digits of its SHA-256."""
    (task,) = plan_tasks(assignments, PARAMS, prefix)
    assert task.name == name
    subprocess.run(["git", "check-ref-format", f"refs/exps/00/00/{task.name}"], check=True)


@pytest.mark.parametrize(
    "value",
    ["", "it's", "a\\", "\\'", "x\\\\'y\\\\", "null", "1e-4", "true", "a,b", "[a]", "{a: b}", "a=b:c", ' "q" ', "€ ü"],
)
def test_hydra_reads_a_text_as_it_was_meant(value):
    """By DVC's own parser of `--set-param`."""
    (task,) = plan_tasks([f"sample.negative_prompt={json.dumps(value)}"], PARAMS)
    assert task.params.sample.negative_prompt == value
    (override,) = OverridesParser.create().parse_overrides(list(task.overrides))
    assert override.value() == value


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("train.lr=1e-5", 1e-5),
        ("train.snr_gamma=null", None),
        ("train.compile=false", False),
        ("train.max_steps=70", 70),
        ("train.trackers=[tensorboard]", ["tensorboard"]),
    ],
)
def test_hydra_reads_other_values_with_their_type(assignment, value):
    (task,) = plan_tasks([assignment], PARAMS)
    (override,) = OverridesParser.create().parse_overrides(list(task.overrides))
    assert override.value() == value
    assert type(override.value()) is type(value)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["train.lrr=1"],
            "params.yaml with train.lrr=1 has 1 fault:\n  train.lrr = 1: unknown key; nearest is train.lr",
        ),
        (["train.lr=1e-4,-1.0"], "params.yaml with train.lr=-1.0 has 1 fault:\n  train.lr = -1.0: "),
        (["train.precision=fp32,fp8"], "train.precision = 'fp8': must be one of 'fp32', 'bf16', 'fp16'"),
        (["sample.negative_prompt=${x}"], "'${x}': DVC would resolve ${…} in a value; put it into the params file"),
        (["train.lr.x=1"], "train.lr.x: train.lr has no keys of its own"),
        (["dataset.condition_columns.hint=outline"], "condition_columns.hint"),
        (["train.lr=1e-4", "train.lr=2e-4"], "train.lr is given twice; give all its values at once"),
        (["train.lr=1e-4,0.0001"], "train.lr=0.0001 and train.lr=0.0001 are the same task; leave one out"),
        (["train.weight_decay=0,0.0"], "train.weight_decay=0 and train.weight_decay=0.0 are the same task"),
    ],
)
def test_a_wrong_combination_is_refused_before_anything_runs(assignments, message):
    with pytest.raises(InputError) as caught:
        plan_tasks(assignments, PARAMS)
    assert message in str(caught.value)


def test_a_key_that_the_file_lacks_is_refused_as_dvc_would(tmp_path):
    tree = yaml.safe_load(PARAMS.read_text())
    tree["validation"] |= {"prompts": [], "num_held_out": 1}
    tree["dataset"] |= {"world": "free_shapes", "new_fraction": 0.0}
    tree |= {"method": {"name": "controlnet", "start": "unet"}}
    tree["sample"] |= {"prompts": [], "num_held_out": 2}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(
        InputError, match=r"dataset.condition_columns.hint isn't in the file, and DVC sets only what is"
    ):
        plan_tasks(["dataset.condition_columns.hint=outline"], tmp_path / "params.yaml")


@pytest.mark.parametrize("prefix", ["a/b", "", "-a", ".x", "a..b", "a b", "x.lock"])
def test_a_prefix_that_git_or_dvc_refuses_is_refused(prefix):
    with pytest.raises(InputError, match=re.escape(f"--name {prefix!r}: can't begin an experiment's name")):
        plan_tasks(["train.lr=1.0e-4"], PARAMS, prefix)

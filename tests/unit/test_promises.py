"""What the default job promises, held against the stored numbers of the shipped run (metrics/ and dvc.lock in git)."""

import csv
import hashlib
import json
import math
from functools import reduce
from pathlib import Path

import pytest
from dvc.utils.serialize import load_yaml  # PyYAML would read 1e-08 as a string

ROOT = Path(__file__).resolve().parents[2]
LOCK = load_yaml(ROOT / "dvc.lock")["stages"]
FLOORS = {"new_color_accuracy_trained": 0.85, "new_shape_accuracy_trained": 0.60, "new_style_accuracy_trained": 0.70}
"""Each lies below the 95 % interval of the run that it was set on, so that another machine's rounding breaks none."""
KNOWN = [f"known_{field}_accuracy" for field in ("color", "shape", "style", "size", "position", "background")]
MAX_FORGOTTEN = 0.10
KEPT = {
    **dict.fromkeys(FLOORS, 1.0),
    **dict.fromkeys((f"{name}_{model}" for name in KNOWN for model in ("base", "trained")), 1.0),
    "held_out_loss_gain_ci_low": 0.1,
    "base_validation_loss": 0.2,
    "best_validation_loss": 0.1,
    "num_skipped_steps": 0,
}
"""Numbers that keep every promise, to be doctored."""


def broken_promises(numbers: dict[str, float]) -> list[str]:
    """Every promise that the numbers of metrics/evaluate.json and metrics/train.json don't keep, in words.

    A number that is missing or not finite keeps no promise.
    """
    broken = []

    def value(name: str) -> float:
        number = numbers.get(name, math.nan)
        if not math.isfinite(number):
            broken.append(f"{name} is {number if name in numbers else 'missing'}")
        return number

    for name, floor in FLOORS.items():
        if value(name) < floor:
            broken.append(f"{name} = {numbers[name]:.4f}, promised are {floor:.2f} or more")
    for name in KNOWN:
        base, trained = value(f"{name}_base"), value(f"{name}_trained")
        if round(base - trained, 9) > MAX_FORGOTTEN:
            broken.append(f"{name} fell from {base:.4f} to {trained:.4f}, promised is {MAX_FORGOTTEN:.2f} at most")
    if value("held_out_loss_gain_ci_low") <= 0:
        broken.append(f"held_out_loss_gain_ci_low = {numbers['held_out_loss_gain_ci_low']:.4f}, promised is above 0")
    if value("best_validation_loss") >= value("base_validation_loss"):
        broken.append(f"best_validation_loss = {numbers['best_validation_loss']:.4f} isn't below the base's")
    if value("num_skipped_steps") > 0:
        broken.append(f"num_skipped_steps = {numbers['num_skipped_steps']}, promised are 0")
    return broken


def stored(name: str) -> dict[str, float]:
    return json.loads((ROOT / "metrics" / name).read_text())


@pytest.fixture
def numbers() -> dict[str, float]:
    return stored("evaluate.json") | stored("train.json")


@pytest.fixture
def params() -> dict:
    return load_yaml(ROOT / "params.yaml")


def test_the_shipped_run_keeps_every_promise(numbers):
    assert broken_promises(numbers) == []


@pytest.mark.parametrize(
    ("name", "just_good", "bad"),
    [
        ("new_color_accuracy_trained", 0.85, 0.849),
        ("new_shape_accuracy_trained", 0.60, 0.599),
        ("new_style_accuracy_trained", 0.70, 0.699),
        *((f"{name}_trained", 0.90, 0.899) for name in KNOWN),
        ("held_out_loss_gain_ci_low", 1e-6, 0.0),
        ("best_validation_loss", 0.199, 0.2),
        ("num_skipped_steps", 0, 1),
    ],
)
def test_a_promise_can_be_broken(name, just_good, bad):
    assert broken_promises(KEPT | {name: just_good}) == []
    (broken,) = broken_promises(KEPT | {name: bad})
    assert name.removesuffix("_trained") in broken


@pytest.mark.parametrize("name", KEPT)
def test_a_number_that_is_missing_or_not_finite_keeps_no_promise(name):
    assert broken_promises(KEPT | {name: math.nan}) == [f"{name} is nan"]
    assert broken_promises({key: value for key, value in KEPT.items() if key != name}) == [f"{name} is missing"]


def test_the_stored_metrics_are_those_that_the_locked_run_wrote():
    """So that nobody edits a number by hand, and dvc.lock isn't committed without its metrics."""
    locked = {out["path"]: out["md5"] for stage in LOCK.values() for out in stage["outs"] if "metrics/" in out["path"]}
    there = [path for path in (ROOT / "metrics").iterdir() if path.is_file()]
    assert {f"metrics/{path.name}": hashlib.md5(path.read_bytes()).hexdigest() for path in there} == locked


@pytest.mark.parametrize("stage", LOCK)
def test_the_locked_run_is_of_the_shipped_params(stage, params):
    locked = LOCK[stage]["params"]["params.yaml"]
    shipped = {key: reduce(lambda tree, part: tree[part], key.split("."), params) for key in locked}
    assert shipped == locked, "run dvc repro"


def test_the_stored_counts_are_of_the_shipped_params(numbers, params):
    evaluate, train = params["evaluate"], params["train"]
    assert numbers["num_prompts"] == evaluate["num_prompts"]
    counts = stored("dataset.json")
    num_reported = counts.get("num_test", counts["num_validation"])
    assert numbers["num_held_out"] == min(num_reported, evaluate["max_samples"])
    assert numbers["num_steps"] == train["max_steps"]


def test_table_and_metrics_say_the_same(numbers):
    with (ROOT / "metrics" / "prompt_accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = {f"{row['prompts']}_{row['attribute']}_accuracy_{row['model']}": float(row["accuracy"]) for row in rows}
    assert table == {name: value for name, value in numbers.items() if "_accuracy_" in name}
    for row in rows:
        chosen = row["prompts"] == "new" and row["attribute"] in ("color", "shape", "style")  # where it is new
        assert 0 < int(row["num"]) <= numbers["num_prompts"]
        assert chosen or int(row["num"]) == numbers["num_prompts"]
        right = float(row["accuracy"]) * int(row["num"])
        assert right == pytest.approx(round(right)), row

"""What recipes/controlnet.yaml promises, by the real `dvc`: objects lie where hints say; a run that failed says so."""

import shutil

import pytest

from tests.conftest import ROOT
from tests.e2e.project import Project


@pytest.mark.full
def test_a_controlnet_follows_its_hints(tmp_path):
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project")
    shutil.copyfile(ROOT / "recipes" / "controlnet.yaml", project.folder / "params.yaml")
    assert "hardly uses" not in project.run("dvc repro evaluate").split("step 300")[1]
    numbers = project.json("metrics/evaluate.json")
    assert numbers["known_hint_accuracy_trained"] >= 0.7
    assert numbers["known_hint_accuracy_base"] < 0.25
    assert numbers["hint_gap_base"] == 0
    assert numbers["hint_gap_trained_ci_low"] > numbers["held_out_loss_trained"]
    for field in ("color", "shape", "background"):
        assert numbers[f"known_{field}_accuracy_trained"] >= 0.9, field


@pytest.mark.full
def test_a_learning_rate_100_times_too_low_is_called_out(tmp_path):
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project")
    shutil.copyfile(ROOT / "recipes" / "controlnet.yaml", project.folder / "params.yaml")
    project.run("dvc repro precompute")
    printed = project.run("dvc exp run -S train.lr=1e-5 train")
    assert "WARNING: the model ignores what it is told:\nthe model hardly uses the hint" in printed

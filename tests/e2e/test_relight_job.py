"""What recipes/relight.yaml promises, by the real `dvc`: objects are relit as asked; a run that failed says so."""

import shutil

import pytest

from tests.conftest import ROOT
from tests.e2e.project import Project


def project_in(folder) -> Project:
    (folder / "project").mkdir()
    project = Project(folder / "project")
    shutil.copyfile(ROOT / "recipes" / "relight.yaml", project.folder / "params.yaml")
    return project


@pytest.mark.full
def test_objects_are_relit(tmp_path):
    project = project_in(tmp_path)
    assert "WARNING" not in project.run("dvc repro")
    numbers = project.json("metrics/evaluate.json")
    assert numbers["light_direction_accuracy_trained"] >= 0.85
    assert numbers["color_accuracy_trained"] >= 0.95
    for baseline in ("base", "copy"):
        assert numbers[f"light_direction_accuracy_{baseline}"] < 0.4
    assert numbers["light_direction_accuracy_vae"] == 1
    assert numbers["foreground_iou_trained"] > 0.8
    assert numbers["light_sensitivity_trained"] > 0.2
    assert numbers["linearity_error_trained"] < 0.5
    assert numbers["foreground_gap_trained_ci_low"] > 0.1 * numbers["held_out_loss_trained"]


@pytest.mark.full
def test_a_learning_rate_100_times_too_low_is_called_out(tmp_path):
    project = project_in(tmp_path)
    printed = project.run("dvc exp run -S train.lr=2e-5 -S train.max_steps=300 train")
    assert "WARNING: the model ignores what it is told:\nthe model hardly uses the foreground" in printed

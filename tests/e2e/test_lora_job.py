"""What recipes/lora.yaml promises, by the real `dvc`: about as good as full fine-tuning, and nothing forgotten."""

import shutil

import pytest

from tests.conftest import ROOT
from tests.e2e.project import Project


@pytest.mark.full
def test_a_lora_learns_the_shipped_job(tmp_path):
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project")
    shutil.copyfile(ROOT / "recipes" / "lora.yaml", project.folder / "params.yaml")
    project.run("dvc repro evaluate")
    numbers = project.json("metrics/evaluate.json")
    for name, least in (("new_color", 0.85), ("new_shape", 0.55), ("new_style", 0.70)):
        assert numbers[f"{name}_accuracy_trained"] >= least, name
    known = [name for name in numbers if name.startswith("known_") and name.endswith("_base")]
    assert len(known) == 6
    for name in known:
        assert numbers[name.replace("_base", "_trained")] >= numbers[name] - 0.05, name

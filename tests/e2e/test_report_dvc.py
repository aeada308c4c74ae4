"""The report on what the real `dvc` leaves: an experiment's images come from its cache, and return there as it says.

A script stands in for the stages.
"""

import re
import shutil
from html import unescape
from pathlib import Path

import pytest
import yaml

from sdtrain.tools.compare.runs import read_run
from sdtrain.tools.report import report
from tests.e2e.project import Project
from tests.unit.test_compare import LOSS

STAND_IN = '''\
"""Writes one image of each model, the trained one as bright as the learning rate is high; and a held-out loss."""

import json
from pathlib import Path

import yaml
from PIL import Image

lr = yaml.safe_load(Path("params.yaml").read_text())["train"]["lr"]
Path("data/samples/images").mkdir(parents=True)
drawn = []
for model, value in (("base", 0), ("trained", int(1e5 * lr))):
    drawn.append({"file": f"images/{model}.png", "prompt": 0, "text": "a circle", "item": None, "light": None})
    drawn[-1] |= {"model": model, "seed": 0, "guidance_scale": 4.0}
    Image.new("RGB", (8, 8), (value, 0, 0)).save(Path("data/samples", drawn[-1]["file"]))
Path("data/samples/samples.json").write_text(json.dumps({"drawn": drawn, "given": []}))
Path("metrics").mkdir(exist_ok=True)
Path("metrics/evaluate.json").write_text(json.dumps({"held_out_loss_trained": lr}))
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """HEAD and the experiment `odd`."""
    folder = tmp_path_factory.mktemp("report") / "project"
    folder.mkdir()
    project = Project(folder, train={"lr": 1e-3})
    stage = {
        "cmd": "python stand_in.py",
        "params": ["train.lr", "train.seed"],
        "outs": ["data/samples"],
        "metrics": [{"metrics/evaluate.json": {"cache": False}}],
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"all": stage}}))
    (folder / "stand_in.py").write_text(STAND_IN)
    project.run("dvc repro")
    project.commit("run")
    project.run("dvc exp run --temp --set-param train.lr=2e-3 --name odd")
    return project


def changes(folder: Path) -> tuple[list[str], str]:
    """By how much rows changed in the experiment, as the page says it; and the page."""
    page = report(folder, [read_run(folder, "odd")], [], [LOSS], 10)
    return re.findall(r"changed ([\d.]+) %", page), unescape(re.sub(r"<[^>]+>", "", page))


def test_images_come_from_the_cache_and_where_they_are_missing_the_page_says_how_to_get_them(project, tmp_path):
    expected = [f"{100 * 200 / 255 / 3:.1f}"]
    assert changes(project.folder)[0] == expected
    assert "0.001" in (project.folder / "params.yaml").read_text(), "the experiment isn't in the workspace"

    commit = project.run("git rev-parse $(git for-each-ref --format '%(refname)' 'refs/exps/*/*/odd')").strip()
    project.run(f"git checkout --quiet {commit}")
    project.run("dvc checkout")
    project.run(f"dvc remote add --local --default storage {tmp_path}")
    project.run("dvc push data/samples")
    shutil.rmtree(project.folder / ".dvc" / "cache")
    found, text = changes(project.folder)
    assert found == []
    advice = re.search(r"odd: data/samples isn't in DVC's cache; get it with (.*) and (dvc fetch \S+)\.", text)
    for command in advice.groups():
        project.run(command)
    assert changes(project.folder)[0] == expected

"""`sdtrain plan` and `sdtrain overfit`, through the command line."""

import json
import re

import pytest
import yaml

from sdtrain.cli import main
from tests.conftest import ROOT, shrunk_tree


@pytest.fixture
def command(workspace, tmp_path, monkeypatch, capsys):
    """Run `sdtrain NAME` on the shrunken project with changed params; what it printed."""
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)

    def run(name: str, *options: str, places: dict | None = None, **changes) -> str:
        places = places or {"base": workspace.base, "latents": workspace.latents}
        AcceleratorState._reset_state(reset_partial_state=True)
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(shrunk_tree(**changes)))
        main([name, "--base", str(places["base"]), "--latents", str(places["latents"]), *options])
        return capsys.readouterr().out

    return run


def lines_of(output: str) -> dict[str, str]:
    return {line[:16].strip(): line[17:] for line in output.splitlines()}


def test_the_plan_says_what_the_params_will_do(command, workspace):
    num_train = json.loads((workspace.folder / "dataset.json").read_text())["num_train"]
    train = {"max_steps": None, "max_epochs": 3, "batch_size": 8, "micro_batch_size": 2, "lr": 1e-4}
    scaling = {"lr_scaling": "sqrt", "lr_reference_batch_size": 2}
    plan = lines_of(command("plan", train={**train, **scaling}))
    assert plan["pictures"].startswith(f"{num_train} to train on, 4 held out")
    assert plan["steps"].startswith(f"{-(-3 * num_train // 8)} of 8 pictures, 3.0 epochs")
    assert plan["effective batch"] == "8 = 1 processes x 4 micro-batches x 2"
    assert plan["learning rate"].startswith("0.0002 at its top, cosine")
    assert plan["trained"].startswith("2,839,268 parameters")
    assert re.match(r"about 0\.\d\d GiB per process, of \d+\.\d\d GiB", plan["memory"])
    assert "starts afresh; it has no saved state" in plan["resume"]
    assert plan["time"].startswith("not measured")


def test_the_plan_counts_processes(command, monkeypatch):
    monkeypatch.setenv("NPROC", "4")
    with pytest.raises(SystemExit, match="can't be split into micro-batches of 8 on 4 processes"):
        command("plan")
    assert "8 = 4 processes x 1 micro-batches x 2" in command("plan", train={"micro_batch_size": 2})


def test_the_plan_times_steps(command):
    text = lines_of(command("plan", "--time-steps", "2"))["time"]
    assert re.match(r"about \d+\.\d min of training steps, \d+ ms each here \(2 timed\)", text)


def test_the_plan_finds_the_saved_state(command, workspace, tmp_path):
    workspace.train(tmp_path)
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    (tmp_path / "resume").rename(tmp_path / ".dvc" / "tmp" / "resume")
    assert re.search(r"resumes from .*step-00000004", lines_of(command("plan"))["resume"])


def test_before_anything_is_made_the_plan_reads_the_params(command, tmp_path):
    nothing = {"base": tmp_path / "nothing", "latents": tmp_path / "nothing"}
    changes = {"base": {"path": str(ROOT / "data" / "builtin")}, "dataset": {"num_scenes": 1000}}
    plan = lines_of(command("plan", places=nothing, **changes))
    assert plan["pictures"] == "900 to train on, 100 held out (about, as params.yaml says)"
    assert plan["trained"].startswith("2,839,268 parameters")
    with pytest.raises(SystemExit, match="isn't there, so the pictures aren't counted yet"):
        command("plan", places=nothing, dataset={"source": "imagefolder"}, base=changes["base"])


def test_one_batch_is_overfitted(command):
    out = command("overfit", "--steps", "80", "--rows", "2")
    share = float(re.search(r"fell to ([\d.]+)% of its first value", out)[1])
    assert share < 5


def test_a_batch_that_cannot_be_overfitted_fails_the_command(command):
    with pytest.raises(SystemExit, match=r"one batch of 2 can't be overfitted.*try another train.lr \(it is 1e-09"):
        command("overfit", "--steps", "3", "--rows", "2", train={"lr": 1e-9})

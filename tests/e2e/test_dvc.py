"""The real `dvc` binary on a shrunken copy of the project, through the commands that the README shows.

The tests of this file build on each other in their order: each starts where the one before ended.
"""

import csv
import subprocess
import time

import pytest
import yaml

from sdtrain.params.load import load_params
from tests.conftest import ROOT, shrunk_tree
from tests.e2e.project import Project

STAGES = ["base", "features", "dataset", "precompute", "train", "export", "sample", "evaluate", "card"]


def stages_run(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    folder = tmp_path_factory.mktemp("e2e") / "project"
    folder.mkdir()
    return Project(folder)


def test_repro_runs_every_stage_and_git_stays_small(project):
    assert stages_run(project.readme("dvc repro")) == STAGES
    project.commit("first run")
    tracked = project.run("git ls-files data").split()
    meant = ("data/builtin/", "data/builtin_clip/", "data/images/", "data/start/", "data/offset/", "data/.gitignore")
    assert not [name for name in tracked if not name.startswith(meant)]
    assert (project.folder / "data" / "samples" / "grid.png").exists()
    assert list((project.folder / "runs").rglob("events.out.tfevents.*"))


def test_a_second_repro_is_up_to_date(project):
    output = project.run("dvc repro")
    assert stages_run(output) == []
    assert "up to date" in output


def test_num_workers_reruns_nothing(project):
    project.run("sed -i 's/num_workers: 0/num_workers: 2/' params.yaml")
    assert stages_run(project.run("dvc repro --dry")) == []
    project.run("git checkout params.yaml")


def test_a_new_learning_rate_reruns_train_and_what_follows(project):
    output = project.readme("dvc exp run -S train.lr=1e-5")
    assert stages_run(output) == STAGES[STAGES.index("train") :]
    config = project.json("data/checkpoints/last/training_config.json")
    assert config["params"]["train"]["lr"] == 1e-5
    with (project.folder / "metrics" / "train.csv").open() as file:
        assert float(next(csv.DictReader(file))["lr"]) == 1e-5


def test_experiments_are_shown_and_compared(project):
    shown = project.readme("dvc exp show")
    assert "main" in shown
    table = list(csv.DictReader(project.run("dvc exp show --csv").splitlines()))
    rates = {row["train.lr"] for row in table}
    assert {"1e-05"} < rates
    assert "held_out_loss_trained" in project.readme("dvc metrics diff")
    assert "train.lr" in project.readme("dvc params diff")
    assert "index.html" in project.readme("dvc plots diff")
    page = (project.folder / "dvc_plots" / "index.html").read_text()
    assert "grid.png" in page
    assert "held-out loss" in page


def test_a_typo_is_refused_before_anything_runs(project):
    output = project.run("dvc exp run -S train.lrr=1e-5", ok=False)
    assert "train.lrr" in output


def test_a_wrong_value_is_explained_by_the_stage(project):
    output = project.run("dvc exp run -S train.precision=fp8", ok=False)
    assert "error: params.yaml has 1 fault:" in output
    assert "train.precision = 'fp8': must be one of 'fp32', 'bf16', 'fp16'" in output
    assert "Traceback" not in output
    # Without `rm`, git may take a table of the same size for the committed one: `dvc exp run` rewrites its index.
    project.readme("rm -r metrics && git checkout params.yaml dvc.lock metrics && dvc checkout")


@pytest.mark.full
def test_temp_run_uses_its_snapshot_and_leaves_the_workspace_alone(project):
    before = (project.folder / "params.yaml").read_text()
    num_runs = len(list((project.folder / "runs").iterdir()))
    project.readme("dvc exp run --temp -S train.lr=3e-5")
    assert (project.folder / "params.yaml").read_text() == before
    assert len(list((project.folder / "runs").iterdir())) == num_runs + 1, (
        "TensorBoard's events outlive the temp folder"
    )
    rates = {row["train.lr"] for row in csv.DictReader(project.run("dvc exp show --csv").splitlines())}
    assert "3e-05" in rates


@pytest.mark.full
def test_a_queue_runs_a_grid_of_values(project):
    output = project.readme("dvc exp run --queue -S 'train.lr=1e-4,2e-4'")
    assert output.count("Queued experiment") == 2
    project.readme("dvc queue start")
    for _ in range(600):
        status = project.run("dvc queue status")
        if "Queued" not in status and "Running" not in status:
            break
        time.sleep(1)
    assert status.count("Success") == 2, status + project.run(
        "dvc queue logs $(dvc exp list --name-only | head -1) || true"
    )
    rows = list(csv.DictReader(project.run("dvc exp show --csv").splitlines()))
    losses = {row["train.lr"]: row["best_validation_loss"] for row in rows}
    assert {"0.0001", "0.0002"} <= set(losses)
    assert losses["0.0001"] != losses["0.0002"]


def test_push_and_pull_through_a_local_remote(project, tmp_path):
    project.run(f"dvc remote add --default storage {tmp_path / 'storage'}")
    assert "pushed" in project.readme("dvc push")
    project.commit("a remote")
    clone = tmp_path / "clone"
    project.run(f"git clone --quiet {project.folder} {clone}")
    fetched = subprocess.run(
        "dvc pull && dvc status", shell=True, cwd=clone, env=project.env, capture_output=True, text=True
    )
    assert fetched.returncode == 0, fetched.stderr
    assert "up to date" in fetched.stdout
    name = "data/model/unet/diffusion_pytorch_model.safetensors"
    assert (clone / name).read_bytes() == (project.folder / name).read_bytes()


def test_changed_images_rerun_the_data_set(project):
    """The images' folder is a dep: its content can't go stale."""
    (project.folder / "data" / "images" / "new.txt").write_text("a caption")
    assert "dataset" in stages_run(project.run("dvc repro --dry"))
    (project.folder / "data" / "images" / "new.txt").unlink()


def test_what_a_run_branches_from_is_watched(project):
    """The content of train.branch_from counts, not its name alone."""
    (project.folder / "data" / "start" / "weights").write_text("other weights")
    assert stages_run(project.run("dvc repro --dry"))[0] == "train"
    (project.folder / "data" / "start" / "weights").unlink()
    assert stages_run(project.run("dvc repro --dry")) == []


def test_a_key_of_the_method_reruns_no_stage_before_train(project):
    """Neither its value in params.yaml, nor its field in the schema, nor the method's own code."""
    changed = {
        "params.yaml": ("  name: finetune", "  name: finetune\n  rank: 4"),
        "src/sdtrain/params/schema.py": (
            '    name: Literal["finetune"]',
            '    name: Literal["finetune"]\n    rank: int',
        ),
        "src/sdtrain/methods/finetune.py": ("        self.logged", "        self.rank = 4\n        self.logged"),
    }
    for name, (before, after) in changed.items():
        path = project.folder / name
        assert before in path.read_text(), name
        path.write_text(path.read_text().replace(before, after, 1))
    assert stages_run(project.run("dvc repro --dry"))[0] == "train"
    project.run("git checkout params.yaml src")
    assert stages_run(project.run("dvc repro --dry")) == []


@pytest.mark.full
def test_another_rank_reruns_train_and_what_follows(project):
    """LoRA's own keys, on the base, images and cache of the full fine-tuning before it."""
    method = load_params(ROOT / "recipes" / "lora.yaml").method.model_dump()
    (project.folder / "params.yaml").write_text(yaml.safe_dump(shrunk_tree(method=method), sort_keys=False))
    output = project.run("dvc repro")
    assert set(stages_run(output)) <= set(STAGES[STAGES.index("train") :])
    assert "adapter" in (project.folder / "data" / "card" / "README.md").read_text()
    project.commit("a LoRA")
    output = project.readme("dvc exp run -S method.rank=4")
    assert stages_run(output) == STAGES[STAGES.index("train") :]
    assert project.json("data/model/training_config.json")["params"]["method"]["rank"] == 4
    assert not (project.folder / "data" / "model" / "model_index.json").exists()

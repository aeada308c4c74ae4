"""A run of any method that SIGKILL ends, and that must come to the same end as one that it didn't."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml

from sdtrain.data.batches import BatchMaker
from sdtrain.params.load import load_params
from sdtrain.train import train
from sdtrain.training.files import TrainFiles
from tests.conftest import ROOT, merged, shrunk_tree

KILL_AT = 3
_LENGTH = {"train": {"max_steps": 6, "save_every_n_steps": 2}}


def assert_kill_changes_nothing(workspace, folder: Path, weights: str, capfd, changes: dict[str, dict]) -> None:
    """Train twice, once killed in the step that follows three steps; checkpoints and curves must agree to the bit.

    Args:
        weights: name of a checkpoint's file of weights.
        changes: of the shrunken params, by section.
    """
    changes = merged(changes, _LENGTH)
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    whole = workspace.train(folder / "whole", **changes)
    done = _run_until_killed(workspace, folder / "killed", changes)
    assert done.returncode == -9, done.stderr
    capfd.readouterr()
    killed = workspace.train(folder / "killed", **changes)
    assert "resumes from step 2 of 6" in capfd.readouterr().out
    for name in ("best/raw", "best/ema", "last/raw", "last/ema"):
        ours, theirs = ((place.checkpoints / name / weights).read_bytes() for place in (killed, whole))
        assert ours == theirs, name
    pd.testing.assert_frame_equal(killed.train_curve, whole.train_curve, check_exact=True)
    pd.testing.assert_frame_equal(killed.validation_curve, whole.validation_curve, check_exact=True)


def _run_until_killed(workspace, folder: Path, changes: dict[str, dict]) -> subprocess.CompletedProcess:
    """Train in a process of its own."""
    (folder / "params.yaml").write_text(yaml.safe_dump(shrunk_tree(**changes)))
    return subprocess.run(
        [sys.executable, "-m", "tests.integration.killed", *map(str, (folder, workspace.base, workspace.latents))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
        capture_output=True,
        text=True,
    )


def main(folder: str, base: str, latents: str) -> None:
    make = BatchMaker.make

    def make_or_die(self, step, *arguments):
        if step == KILL_AT:
            os.kill(os.getpid(), 9)
        return make(self, step, *arguments)

    BatchMaker.make = make_or_die
    place = Path(folder)
    train(
        load_params(place / "params.yaml"),
        TrainFiles(
            base=Path(base), latents=Path(latents), checkpoints=place / "checkpoints", metrics=place / "train.json",
            train_curve=place / "train.csv", speed_curve=place / "train_speed.csv",
            validation_curve=place / "validation.csv", validation_images=place / "validation", runs=place / "runs",
            states=place / "resume",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])

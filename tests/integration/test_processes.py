"""More than one process: the same curve as one, under torchrun, with the stage's own launcher."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.conftest import ROOT, shrunk_tree

NUM_STEPS = 12


class Place:
    """A folder in which the stage `train` runs with its own outs and states."""

    def __init__(self, folder: Path, workspace) -> None:
        self.folder = folder
        (folder / "data").mkdir(parents=True)
        for name in ("base", "latents"):
            (folder / "data" / name).symlink_to(getattr(workspace, name))
        train = {"max_steps": NUM_STEPS, "micro_batch_size": 2, "save_every_n_steps": 2}
        tree = shrunk_tree(train=train, validation={"every_n_steps": 4, "prompts": ["a red circle"]})
        (folder / "params.yaml").write_text(yaml.safe_dump(tree))

    def start(self, **environment: object) -> subprocess.Popen:
        ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in environment.items()}}
        return subprocess.Popen(
            [sys.executable, "-m", "stages.train"],
            cwd=self.folder,
            env={**os.environ, **ours},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, code: int = 0, **environment: object) -> str:
        process = self.start(**environment)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        return output

    def saved_steps(self) -> list[int]:
        return sorted(int(p.name.removeprefix("step-")) for p in self.folder.glob(".dvc/tmp/resume/*/step-????????"))

    def curve(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / "metrics" / f"{name}.csv")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def assert_same_curves(one: Place, two: Place) -> None:
    pd.testing.assert_frame_equal(one.curve("train"), two.curve("train"), rtol=2e-4, atol=1e-9)
    ours, theirs = one.curve("validation"), two.curve("validation")
    gaps = [name for name in ours if name.startswith("gap_")]  # differences of losses, so rounded like these
    pd.testing.assert_frame_equal(ours[gaps], theirs[gaps], rtol=0, atol=1e-5)
    pd.testing.assert_frame_equal(ours.drop(columns=gaps), theirs.drop(columns=gaps), rtol=2e-4, atol=1e-9)


@pytest.fixture(scope="module")
def alone(workspace, tmp_path_factory) -> Place:
    """One process's run."""
    place = Place(tmp_path_factory.mktemp("processes") / "alone", workspace)
    place.run()
    return place


def test_two_processes_train_the_same_curve(workspace, alone, tmp_path):
    two = Place(tmp_path / "two", workspace)
    two.run(NPROC=2)
    assert_same_curves(alone, two)
    assert two.curve("train").loss.tolist() == pytest.approx(alone.curve("train").loss.tolist(), rel=2e-5)


@pytest.mark.full
def test_a_run_moves_between_numbers_of_processes_and_nodes(workspace, alone, tmp_path):
    """Stopped by SIGTERM on two processes, it ends on two nodes of one process each."""
    place = Place(tmp_path / "moved", workspace)
    process = place.start(NPROC=2)
    while not place.saved_steps():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "stopped by SIGTERM after step" in output
    saved = place.saved_steps()[-1]
    assert 2 <= saved < NUM_STEPS

    common = {"NNODES": 2, "NPROC": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = [place.start(**common, NODE_RANK=rank) for rank in range(2)]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert f"resumes from step {saved} of {NUM_STEPS}" in outputs[0]
    assert_same_curves(alone, place)
    config = json.loads((place.folder / "data" / "checkpoints" / "last" / "training_config.json").read_text())
    assert config["step"] == NUM_STEPS


def test_the_number_of_processes_is_never_assumed(workspace, alone):
    """As though a launcher had started only one of the two processes that were asked for."""
    output = alone.run(code=1, NPROC=2, TORCHELASTIC_RUN_ID="someone's")
    assert "error: the environment asks for 2 processes" in output
    output = alone.run(code=1, ACCELERATE_MIXED_PRECISION="no")
    assert "error: `accelerate launch` doesn't pass on how many processes" in output


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"NPROC": "two"}, "error: NPROC = 'two': must be a whole number of 1 or more"),
        ({"NNODES": 2, "MASTER_ADDR": "a"}, "error: NNODES = 2: set NODE_RANK, MASTER_PORT too"),
    ],
)
def test_a_faulty_launch_is_explained(alone, environment, says):
    assert says in alone.run(code=1, **environment)

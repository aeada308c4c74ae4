"""`sdtrain sweep` with the real `dvc`, on a toy project with the shipped params and two made-up GPUs.

Its one stage takes a moment, in which it writes every 10 ms which GPU it has: what it wrote shows who ran when. Where
processes are killed at random, the moments are chosen with a fixed seed; wherever they land, the end must be the same.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT

NVIDIA_SMI = """\
#!/bin/sh
echo 'GPU 0: NVIDIA L4 (UUID: GPU-aa11)'
echo 'GPU 1: NVIDIA L4 (UUID: GPU-ab22)'
"""
STAGE = """\
import json, os, sys, time
from itertools import pairwise
from pathlib import Path

from sdtrain.ground.gpus import lease_gpus
from sdtrain.params.load import load_params

params, outside = load_params(Path("params.yaml")), Path(os.environ["DVC_ROOT"]).parent
lease_gpus()
seed, gpu = params.train.seed, os.environ["CUDA_VISIBLE_DEVICES"]
ends = time.monotonic() + float((outside / "stage_s").read_text())
try:
    while time.monotonic() < ends:
        with (outside / "ticks").open("a") as file:
            file.write(f"{seed} {gpu} {os.getpid()} {time.monotonic()}\\n")
        time.sleep(0.01)
except KeyboardInterrupt:
    sys.exit("the stage was asked to stop")
if str(seed) in (outside / "failing").read_text().split():
    sys.exit(f"seed {seed} fails on purpose")
Path("metrics").mkdir(exist_ok=True)
metrics = {"seed": seed, "lr": params.train.lr, "length": len(params.sample.negative_prompt)}
metrics["held_out_loss_trained"] = 0.1 + seed / 1000
Path("metrics/evaluate.json").write_text(json.dumps(metrics))
"""
PIPELINE = """\
stages:
  toy:
    cmd: python -m stages.toy
    deps: [stages]
    params: [train, sample]
    metrics:
      - metrics/evaluate.json:
          cache: false
"""
RANKING = "held_out_loss_trained, lower is better; the reference is "
"""How a sweep that came to its end goes on."""
SDTRAIN = [sys.executable, "-c", "from sdtrain.cli import main; main()"]


class Toy:
    """A git repository with one stage, and what its runs wrote."""

    def __init__(self, outside: Path) -> None:
        self.outside, self.folder = outside, outside / "project"
        for name in ("bin", "tmp", "project/.dvc", "project/stages"):
            (outside / name).mkdir(parents=True)
        (outside / "bin" / "nvidia-smi").write_text(NVIDIA_SMI)
        (outside / "bin" / "nvidia-smi").chmod(0o755)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "GIT_", "CUDA_"))}
        self.env |= {
            "PATH": os.pathsep.join([str(outside / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT / "src"),
            "TMPDIR": str(outside / "tmp"),
            "DVC_NO_ANALYTICS": "1",
            "GIT_CONFIG_GLOBAL": str(outside / "gitconfig"),
            **{f"GIT_{who}_{what}": "a@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        }
        self.env.pop("NPROC", None)
        shutil.copyfile(ROOT / "params.yaml", self.folder / "params.yaml")
        (self.folder / "stages" / "toy.py").write_text(STAGE)
        (self.folder / "dvc.yaml").write_text(PIPELINE)
        (self.folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
        (self.folder / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
        (self.folder / ".gitignore").write_text("__pycache__\n")
        self.tell(stage_s="0.3", failing="")
        self.run("git", "init", "--quiet", "--initial-branch", "main")
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "toy")

    def tell(self, **files: str) -> None:
        """Tell the stage how long it takes, and the seeds with which it fails."""
        for name, text in files.items():
            (self.outside / name).write_text(text)

    def run(self, *command: str, code: int = 0) -> str:
        """What a command printed, which must end with this exit code."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == code, f"{command}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def sweep(self, *arguments: str, code: int = 0) -> str:
        return self.run(*SDTRAIN, "sweep", *arguments, code=code)

    def start_sweep(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*SDTRAIN, "sweep", *arguments],
            cwd=self.folder,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def processes(self, *words: str) -> list[psutil.Process]:
        """Those that work in the project and have these words in their command line."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if Path(process.cwd()).is_relative_to(self.folder) and set(words) <= set(process.cmdline()):
                    found.append(process)
        return found

    def ticks(self, seed: int | None = None) -> dict[tuple[str, int], list[float]]:
        """When each process had which GPU."""
        found = defaultdict(list)
        path = self.outside / "ticks"
        for line in path.read_text().splitlines() if path.exists() else []:
            of, gpu, pid, when = line.split()
            if seed in (None, int(of)):
                found[gpu, int(pid)].append(float(when))
        return found

    def results(self) -> dict[str, dict]:
        """The metrics of HEAD's experiments by name, as DVC shows them."""
        (baseline,) = [rev for rev in json.loads(self.run("dvc", "exp", "show", "--json")) if rev["rev"] != "workspace"]
        return {
            experiment["name"]: experiment["revs"][0]["data"]["metrics"]["metrics/evaluate.json"]["data"]
            for experiment in baseline["experiments"] or []
        }

    def copies(self) -> set[Path]:
        """The copies of the project that DVC made for its runs."""
        return set((self.folder / ".dvc" / "tmp" / "exps" / "standalone").glob("tmp*"))

    def stashes(self) -> str:
        """What git and DVC have put away."""
        return self.run("git", "for-each-ref", "refs/stash", "refs/exps/stash")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Iterator[Toy]:
    toy = Toy(tmp_path_factory.mktemp("sweep"))
    yield toy
    for process in toy.processes():  # none, unless a test failed
        process.kill()


def wait_until(reached: Callable[[], object]) -> None:
    for _ in range(6000):
        if reached():
            return
        time.sleep(0.01)
    pytest.fail("waited for a minute")


def test_a_dry_run_only_lists_the_tasks(toy):
    printed = toy.sweep("train.lr=1e-4,2e-4", "train.seed=0..1", "--dry-run")
    assert printed.startswith("tasks: 4 (4 waiting), 2 at once; logs are in .dvc/tmp/sweep\n")
    assert "lr-0.0001-seed-1: waiting: train.lr=0.0001 train.seed=1\n" in printed
    assert toy.ticks() == {}


def test_a_wrong_value_is_told_before_anything_starts(toy):
    printed = toy.sweep("train.lr=1e-4,fast", code=1)
    assert printed.startswith("error: params.yaml with train.lr='fast' has 1 fault:\n  train.lr = 'fast': ")
    assert toy.ticks() == {}


def test_whatever_is_killed_each_result_is_there_once_and_no_gpu_is_shared(toy):
    """Stages, their dvc, and the sweep itself are killed at random; seed 3 fails each time, too."""
    rng, arguments = random.Random(0), ("train.seed=0..3", "--jobs", "3")
    toy.tell(stage_s="2.5", failing="3")
    victims = ["stage", "dvc", "sweep", "dvc"]
    words = {"stage": ("stages.toy",), "dvc": ("exp", "--temp"), "sweep": ("sweep",)}
    landed = []
    for _ in range(4):
        sweep = toy.start_sweep(*arguments)
        while sweep.poll() is None and victims:
            time.sleep(rng.uniform(0.2, 1.5))
            if alive := toy.processes(*words[victims[0]]):
                rng.choice(alive).kill()
                landed.append(victims.pop(0))
        printed, _ = sweep.communicate(timeout=120)
        assert "Traceback" not in printed
        if not victims:
            break
    assert {"stage", "dvc", "sweep"} <= set(landed)

    printed = toy.sweep(*arguments, code=1)
    assert set(toy.results()) == {f"seed-{seed}" for seed in (0, 1, 2)}
    assert "seed-3 failed: dvc ended with exit code 255; .dvc/tmp/sweep/seed-3.log ends with" in printed
    assert "seed 3 fails on purpose" in printed
    why = "left out: seed-3: its task failed: seed 3 fails on purpose (.dvc/tmp/sweep/seed-3.log)\n"
    assert f"Note: {why}" in toy.run(*SDTRAIN, "compare", "seed-0", "seed-3")
    assert toy.run(*SDTRAIN, "compare", "seed-3", code=1).endswith(why)

    toy.tell(stage_s="0.1", failing="")
    toy.sweep(*arguments)
    shared = {"lr": 2e-3, "length": 0}
    expected = {seed: {"seed": seed, **shared, "held_out_loss_trained": 0.1 + seed / 1000} for seed in range(4)}
    assert "left out" not in toy.run(*SDTRAIN, "compare", "seed-0", "seed-3")
    assert toy.results() == {f"seed-{seed}": metrics for seed, metrics in expected.items()}
    num_ticks = sum(map(len, toy.ticks().values()))
    assert f"\n4 skipped\n{RANKING}" in toy.sweep(*arguments)
    assert sum(map(len, toy.ticks().values())) == num_ticks

    spans = defaultdict(list)
    for (gpu, _), times in toy.ticks().items():
        spans[gpu].append((min(times), max(times)))
    for of_one in spans.values():
        of_one.sort()
        assert all(ended < begun for (_, ended), (begun, _) in pairwise(of_one))
    assert toy.stashes() == ""
    assert toy.run("git", "status", "--short") == ""


def test_texts_reach_the_experiment_and_a_finished_one_can_be_applied(toy):
    text = "it's a, b: {c} \\"
    toy.sweep(f"sample.negative_prompt={json.dumps(text)}", "--name", "text")
    ((name, metrics),) = [item for item in toy.results().items() if item[0].startswith("text-")]
    assert metrics["length"] == len(text)
    toy.run("dvc", "exp", "branch", name, "kept")
    toy.run("dvc", "exp", "apply", name)
    assert json.loads((toy.folder / "metrics" / "evaluate.json").read_text()) == metrics
    toy.run("git", "init", "--quiet", "--bare", str(toy.outside / "shared"))
    toy.run("dvc", "exp", "push", str(toy.outside / "shared"), name)
    assert f"/{name}\n" in toy.run("git", "ls-remote", str(toy.outside / "shared"), "refs/exps/*")
    toy.run("git", "branch", "-D", "kept")
    toy.run("git", "reset", "--hard", "--quiet")
    toy.run("git", "clean", "-fdq")


def test_a_task_that_outlives_its_sweep_is_not_started_twice(toy):
    toy.tell(stage_s="1.5")
    first = toy.start_sweep("train.seed=20")
    wait_until(lambda: toy.ticks(20))
    first.kill()
    first.communicate()
    assert f"\n1 skipped\n{RANKING}" in toy.sweep("train.seed=20")
    assert len(toy.ticks(20)) == 1


def test_tasks_that_train_the_same_follow_each_other(toy):
    """Two trainers of one run never work at once, so the second would be refused; it takes the first one's result."""
    toy.tell(stage_s="0.3")
    assert "\n2 done\n" in toy.sweep("train.seed=60", "sample.negative_prompt=a,b", "--name", "same", "--jobs", "2")
    first, second = sorted((min(times), max(times)) for times in toy.ticks(60).values())
    assert first[1] < second[0]


def test_the_workers_of_dvcs_queue_take_gpus_as_well(toy):
    """Two of them at once have one each."""
    toy.tell(stage_s="10")
    toy.run("dvc", "exp", "run", "--queue", "-S", "train.seed=70,71")
    toy.run("dvc", "queue", "start", "--jobs", "2")
    wait_until(lambda: {metrics["seed"] for metrics in toy.results().values()} >= {70, 71})
    gpus = [gpu for seed in (70, 71) for gpu, _ in toy.ticks(seed)]
    assert sorted(gpus) == ["GPU-aa11", "GPU-ab22"]


def test_a_stage_whose_dvc_is_dead_is_stopped_before_its_task_runs_again(toy):
    """And the copy of the project in which it ran is deleted."""
    before = toy.copies()
    toy.tell(stage_s="30")
    first = toy.start_sweep("train.seed=21")
    wait_until(lambda: toy.ticks(21))
    assert len(toy.copies() - before) == 1
    first.kill()
    first.communicate()
    for dvc in toy.processes("exp", "--temp"):
        dvc.kill()
    toy.tell(stage_s="0.3")
    assert f"\n1 done\n{RANKING}" in toy.sweep("train.seed=21")
    (_, orphan), (_, second) = sorted(toy.ticks(21).items(), key=lambda item: item[1])
    assert max(orphan) < min(second)
    assert toy.copies() <= before


def test_ctrl_c_lets_the_stages_stop_and_the_same_command_resumes(toy):
    toy.tell(stage_s="30")
    sweep = toy.start_sweep("train.seed=30..31")
    wait_until(lambda: toy.ticks(30) and toy.ticks(31))
    assert {gpu for gpu, _ in [*toy.ticks(30), *toy.ticks(31)]} == {"GPU-aa11", "GPU-ab22"}
    sweep.send_signal(signal.SIGINT)
    printed, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert "SIGINT: stops the running tasks; once more kills them" in printed
    assert printed.endswith("2 waiting\nthe same command resumes the sweep\n")
    for seed in (30, 31):
        assert "the stage was asked to stop" in (toy.folder / ".dvc" / "tmp" / "sweep" / f"seed-{seed}.log").read_text()
    assert toy.processes("stages.toy") == []
    toy.tell(stage_s="0.1")
    assert f"\n2 done\n{RANKING}" in toy.sweep("train.seed=30..31")


def test_a_run_killed_in_its_start_leaves_the_workspace_as_it_was(toy):
    """With DVC in the middle of its snapshot, the sweep that follows puts back what was changed, staged or not."""
    with (toy.folder / "params.yaml").open("a") as file:
        file.write("# mine\n")
    (toy.folder / "new.txt").write_text("staged\n")
    toy.run("git", "add", "new.txt")
    before = toy.run("git", "diff"), toy.run("git", "diff", "--cached")
    sweep = toy.start_sweep("train.seed=40")
    wait_until(lambda: not (toy.folder / ".git" / "HEAD").read_text().startswith("ref: "))
    time.sleep(0.03)
    sweep.kill()
    for dvc in toy.processes("exp", "--temp"):
        dvc.kill()
    sweep.communicate()
    assert f"\n1 done\n{RANKING}" in toy.sweep("train.seed=40")
    assert (toy.run("git", "diff"), toy.run("git", "diff", "--cached")) == before
    assert toy.stashes() == ""
    assert toy.run("git", "symbolic-ref", "HEAD") == "refs/heads/main\n"


def test_an_experiment_of_other_params_or_code_is_not_taken_for_the_task(toy):
    params = toy.folder / "params.yaml"
    params.write_text(params.read_text().replace("noise_offset: 0.0", "noise_offset: 0.1"))
    (toy.folder / "stages" / "toy.py").write_text(STAGE + "# changed\n")
    printed = toy.sweep("train.seed=40", code=1)
    assert printed == (
        "error: there is an experiment seed-40 of this commit with other content: train.noise_offset 0.0 there, 0.1 "
        "here; stages/toy.py; name this sweep with --name, or remove the experiment: dvc exp remove seed-40\n"
    )
    assert "seed-40: waiting" in toy.sweep("train.seed=40", "--name", "offset", "--dry-run")


def test_tasks_that_would_run_other_code_are_not_started(toy):
    toy.tell(stage_s="0.8")
    sweep = toy.start_sweep("train.seed=50,51", "--jobs", "1")
    wait_until(lambda: toy.ticks(50))
    (toy.folder / "stages" / "toy.py").write_text(STAGE + "# changed again\n")
    printed, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 1
    assert "\n1 waiting, 1 done\n" in printed
    assert printed.endswith("error: stages/toy.py changed since the sweep began; tasks not started: 1\n")
    assert toy.ticks(51) == {}

"""Training that is killed under a real `dvc repro` and taken up again ends, to the bit, as if nothing had happened.

The moments are random, chosen and named by what is on the disk: the product knows nothing of this test. Wherever
a signal lands, the end must be the same; so nothing but the count of phases in the full form hangs on timing.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import Literal

import psutil
import pytest

from sdtrain.params.load import load_params
from tests.conftest import CONSISTENT, HINTED, ROOT, merged
from tests.e2e.project import Project

MAX_STEPS, SAVE_EVERY, VALIDATE_EVERY = 16, 2, 4
COMMAND = "dvc repro --force --single-item train"  # --force: not from DVC's cache of runs
METRICS = ("metrics/train.json", "metrics/train.csv", "metrics/validation.csv")

Phase = Literal["training", "validation", "saving", "deleting", "ending"]
"""`deleting` is the end of a save, where the older state goes; `ending`, where the outs are written."""
PHASES: tuple[Phase, ...] = ("training", "validation", "saving")


@dataclass(frozen=True)
class Kill:
    """A signal: to all processes of a run, as a terminal sends it, or to the trainer alone."""

    number: signal.Signals
    to: Literal["group", "trainer"]
    phase: Phase


class Repro:
    """One `dvc repro` of the train stage, in a process group of its own."""

    def __init__(self, project: Project) -> None:
        self._project = project.folder
        states = list(filter(_is_whole, _names_in(_run_folder(self._project))))
        self.first_step = max(map(_step_of, states), default=0)
        self._num_states = len(states)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._started = time.time()
        self.dvc = subprocess.Popen(
            COMMAND.split(),
            cwd=project.folder,
            env=project.env,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> "Repro":
        return self

    def __exit__(self, *_) -> None:
        with suppress(ProcessLookupError):  # nothing is left, unless a test failed
            os.killpg(self.dvc.pid, SIGKILL)
        self.dvc.wait()

    def output(self) -> str:
        """What it and the trainer have printed."""
        return os.pread(self._output.fileno(), 1 << 20, 0).decode()

    def finish(self) -> str:
        """Wait for the good end; the whole output."""
        assert self.dvc.wait(timeout=600) == 0, self.output()
        output = self.output()
        assert not self.first_step or f"resumes from step {self.first_step} of {MAX_STEPS}" in output, output
        return output

    def trainer(self) -> psutil.Process:
        """The process that holds the run's lock."""
        return psutil.Process(json.loads((_run_folder(self._project) / "owner.json").read_text())["pid"])

    def has_begun(self) -> bool:
        """Whether the trainer has the run's lock, and has cleared away what a killed one left."""
        folder = _run_folder(self._project)
        if folder is None or (folder / "owner.json").stat().st_mtime < self._started:
            return False
        return all(map(_is_whole, _names_in(folder) | _names_in(folder / "checkpoints")))

    def coming(self, phase: Phase) -> list[int]:
        """Of the next three steps that it saves after, those whose save is, or is followed by, such a phase."""
        steps = [step for step in range(self.first_step + 1, MAX_STEPS + 1) if step % SAVE_EVERY == 0][:3]
        return {
            "saving": steps,
            "deleting": steps[max(0, 2 - self._num_states) :],  # two states stay
            "validation": [step for step in steps if step % VALIDATE_EVERY == 0],
            "training": [step for step in steps if step % VALIDATE_EVERY != 0],
            "ending": [MAX_STEPS],
        }[phase]

    def phase(self) -> Phase:
        """What the trainer does, or was killed in."""
        folder = _run_folder(self._project)
        states, checkpoints = _names_in(folder), _names_in(folder / "checkpoints")
        newest = max(filter(_is_whole, states), default="step-0")
        num_older = sum(_step_of(name) < _step_of(newest) for name in states)
        if num_older > 1 and _step_of(newest) > self.first_step:
            return "deleting"
        if not all(map(_is_whole, states | checkpoints)):
            return "saving"
        if _step_of(newest) % VALIDATE_EVERY == 0 and newest not in {*checkpoints, "step-0"}:
            return "validation"
        return "ending" if _step_of(newest) == MAX_STEPS else "training"

    def wait_for(self, reached: Callable[[], bool]) -> bool:
        """Look every millisecond; False if the run ends before."""
        while not reached():
            if self.dvc.poll() is not None:
                return False
            assert time.time() - self._started < 600, self.output()
            time.sleep(0.001)
        return True

    def wait_in(self, phase: Phase, rng: random.Random, lengths_s: dict[Phase, float]) -> bool:
        """Wait for a random moment of one of the next such phases; False if the run ends before."""
        state = f"step-{rng.choice(self.coming(phase)):08}"
        delay_s = rng.uniform(0, lengths_s.get(phase, 0.0))
        partial = self._project / "data" / "checkpoints.partial"

        def begins() -> bool:
            if phase == "ending":
                return partial.exists() and partial.stat().st_mtime > self._started
            folder = _run_folder(self._project)
            names = _names_in(folder)
            if phase == "deleting":  # until a file is gone, the older state is still one
                return self.phase() == phase and len({num_files(folder / name) for name in names}) > 1
            return bool({state, f"{state}.partial"} & names) and self.phase() == phase

        reached = self.wait_for(self.has_begun) and self.wait_for(begins)
        time.sleep(delay_s)
        return reached

    def strike(self, kill: Kill) -> Kill | None:
        """Send the signal, and wait until all processes are gone; the kill as it landed, None if it came too late."""
        try:
            trainer = self.trainer()
            if kill.to == "trainer":
                trainer.send_signal(kill.number)
            else:
                os.killpg(self.dvc.pid, kill.number)
        except (psutil.NoSuchProcess, ProcessLookupError):
            return None
        phase = self.phase()
        status = self.dvc.wait(timeout=300)
        wait_until_gone(trainer)
        if status == 0:
            assert phase == "ending", f"{kill}: in vain\n{self.output()}"
            return None
        if kill.number == SIGKILL:
            phase = self.phase()  # nothing has moved since
        elif phase != "ending":
            assert f"stopped by {kill.number.name} after step" in self.output(), self.output()
        return Kill(kill.number, kill.to, phase)


@dataclass
class Whole:
    """A run that nothing stopped."""

    project: Project
    results: dict[str, str]
    lengths_s: dict[Phase, float]
    """How long its phases took, the median of each; a moment lies that far into its phase at the most."""

    def start_over(self) -> None:
        """Leave no saved state."""
        shutil.rmtree(self.project.folder / ".dvc" / "tmp" / "resume")

    def has_checkpoints(self) -> bool:
        """Whether this run's checkpoints are the project's."""
        return checkpoints_of(self.project.folder).items() == {
            (name, digest) for name, digest in self.results.items() if name.startswith("data/checkpoints/")
        }

    def check(self) -> None:
        """The project's last run must have ended as this one did."""
        found = results_of(self.project.folder)
        differ = [name for name in found | self.results if found.get(name) != self.results.get(name)]
        assert not differ, differ


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    return run_whole(tmp_path_factory.mktemp("kill") / "project")


@pytest.fixture(scope="module")
def whole_lora(tmp_path_factory) -> Whole:
    method = load_params(ROOT / "recipes" / "lora.yaml").method.model_dump()
    return run_whole(tmp_path_factory.mktemp("kill_lora") / "project", method={**method, "dropout": 0.1})


@pytest.fixture(scope="module")
def whole_controlnet(tmp_path_factory) -> Whole:
    changes = merged(HINTED, {"validation": {"prompts": [], "num_held_out": 1}})
    return run_whole(tmp_path_factory.mktemp("kill_controlnet") / "project", **changes)


@pytest.fixture(scope="module")
def whole_ic_light(tmp_path_factory) -> Whole:
    changes = merged(CONSISTENT, {"validation": {"prompts": [], "num_held_out": 1}})
    return run_whole(tmp_path_factory.mktemp("kill_ic_light") / "project", **changes)


def run_whole(folder: Path, **changes: dict) -> Whole:
    """Train to the end, unstopped.

    Args:
        changes: of the params, by section.
    """
    folder.mkdir()
    ours = {
        "train": {
            "max_steps": MAX_STEPS,
            "save_every_n_steps": SAVE_EVERY,
            "log_every_n_steps": 3,  # so that most states lie within an interval
            "num_best_checkpoints": MAX_STEPS // VALIDATE_EVERY,  # so that every validation ends with a checkpoint
        },
        "validation": {
            "every_n_steps": VALIDATE_EVERY,
            "prompts": ["a large orange star in the center on a blue background"],
            "num_inference_steps": 12,
        },
    }
    project = Project(folder, **merged(ours, changes))
    project.env["OMP_NUM_THREADS"] = "1"  # as another number of threads makes another order of sums
    project.env["PYTHONPATH"] = "src"  # the copy, which nobody edits while the tests run
    project.run("dvc repro precompute")
    lengths_s: dict[Phase, list[float]] = defaultdict(list)
    with Repro(project) as repro:
        assert repro.wait_for(repro.has_begun), repro.output()
        phase, since = repro.phase(), time.monotonic()
        while repro.dvc.poll() is None:
            if (now := repro.phase()) != phase:
                lengths_s[phase].append(time.monotonic() - since)
                phase, since = now, time.monotonic()
            time.sleep(0.001)
        repro.finish()
    medians = {phase: statistics.median(lengths_s[phase]) for phase in PHASES}
    return Whole(project, results_of(folder), {**medians, "ending": medians["saving"]})


def results_of(project: Path) -> dict[str, str]:
    """SHA-256 of a run's outs, and of what it resumes from, measured times and its name left out.

    Of its states only the newest: the one before it is of an odd step where a signal asked for it there.
    """
    run = _run_folder(project)
    *older, newest = sorted(run.glob("step-*"))
    left_out = {run / "owner.json", newest / "SHA256SUMS", *(path for state in older for path in state.iterdir())}
    kept = [path for path in sorted(run.rglob("*")) if path.is_file() and path not in left_out]
    hashes = {str(path.relative_to(run)): _hash(path.read_bytes()) for path in kept}
    head = json.loads((newest / "state.json").read_text())
    del head["log"]["speed_rows"], head["run_name"]
    hashes[str(newest.relative_to(run) / "state.json")] = _hash(json.dumps(head).encode())
    return hashes | {name: _hash((project / name).read_bytes()) for name in METRICS} | checkpoints_of(project)


def checkpoints_of(project: Path) -> dict[str, str]:
    files = [path for path in sorted((project / "data" / "checkpoints").rglob("*")) if path.is_file()]
    return {str(path.relative_to(project)): _hash(path.read_bytes()) for path in files}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wait_until_gone(process: psutil.Process) -> None:
    """Wait for a process that isn't our child, and may be nobody's who would bury it."""
    for _ in range(300_000):
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.001)
                continue
        return
    pytest.fail(f"{process} doesn't end")


def num_files(folder: Path) -> int:
    """0 once the folder is gone."""
    try:
        return len(os.listdir(folder))
    except FileNotFoundError:
        return 0


def run_once(whole: Whole, waiting: list[Kill], rng: random.Random) -> Kill | None:
    """Run, with the first of the waiting kills that the steps left give time for.

    Returns how it landed, None if the run came to its end.
    """
    with Repro(whole.project) as repro:
        kill = next((kill for kill in waiting if repro.coming(kill.phase)), None)
        if kill is not None:
            waiting.remove(kill)
            if repro.wait_in(kill.phase, rng, whole.lengths_s) and (landed := repro.strike(kill)):
                assert whole.has_checkpoints() or not (whole.project.folder / "data" / "checkpoints").exists()
                return landed
        repro.finish()
        return None


def play(whole: Whole, kills: list[Kill], rng: random.Random) -> list[Kill]:
    """Stop run after run, each going on from where the last one was stopped, in as many trials as it takes.

    Returns the kills as they landed, without those that came after the end.
    """
    landed, waiting = [], list(kills)
    while waiting:
        whole.start_over()
        while kill := run_once(whole, waiting, rng):
            landed.append(kill)
        whole.check()
    print(*(f"{count} x {kill}" for kill, count in Counter(landed).items()), sep="\n")
    return landed


def test_three_kills_change_nothing(whole):
    kills = [
        Kill(SIGKILL, "group", "saving"),
        Kill(SIGTERM, "group", "training"),
        Kill(SIGKILL, "trainer", "validation"),
    ]
    assert play(whole, kills, random.Random(0))


@pytest.mark.full
def test_kills_at_any_moment_change_nothing(whole):
    """Every signal in every phase, more of those that a cluster sends."""
    rng = random.Random(1)
    often: list = [(SIGKILL, "group"), (SIGTERM, "group")]
    ways = [*often, *often, (SIGKILL, "trainer"), (SIGTERM, "trainer"), (SIGINT, "group")]
    kills = [Kill(number, to, phase) for phase in PHASES for number, to in ways]
    kills += [Kill(number, "trainer", phase) for number in (SIGKILL, SIGTERM) for phase in ("deleting", "ending")]
    rng.shuffle(kills)
    landed = play(whole, kills, rng)
    wanted = {(number, phase) for number in (SIGKILL, SIGTERM) for phase in PHASES}
    for _ in range(3):  # a moment's delay may have led into the next phase
        missed = wanted - {(kill.number, kill.phase) for kill in landed}
        if missed:
            landed += play(whole, [Kill(number, "group", phase) for number, phase in sorted(missed)], rng)
    assert wanted <= {(kill.number, kill.phase) for kill in landed}
    assert len(landed) >= 20


@pytest.mark.full
@pytest.mark.parametrize("name", ["whole_lora", "whole_controlnet", "whole_ic_light"])
def test_ten_kills_of_another_method_change_nothing(request, name):
    """Of a LoRA with dropout, whose masks must be the same, too; of a ControlNet; of IC-Light."""
    whole, landed, rng = request.getfixturevalue(name), [], random.Random(3)
    ways: list = [(SIGKILL, "group"), (SIGTERM, "group"), (SIGKILL, "trainer"), (SIGINT, "group")]
    for _ in range(5):  # a kill may come too late
        kills = [Kill(*rng.choice(ways), rng.choice(PHASES)) for _ in range(max(0, 10 - len(landed)))]
        landed += play(whole, kills, rng)
    assert len(landed) >= 10


@pytest.mark.full
def test_a_trainer_that_outlives_dvc_keeps_its_run_to_itself(whole):
    whole.start_over()
    with Repro(whole.project) as orphaned:
        assert orphaned.wait_in("training", random.Random(2), whole.lengths_s)
        trainer = orphaned.trainer()
        orphaned.dvc.kill()
        orphaned.dvc.wait()
        trainer.suspend()  # so that it surely still trains once the second one comes to the lock
        refused = whole.project.run(COMMAND, ok=False)
        assert f"another process is already training this run (pid {trainer.pid} on" in refused
        trainer.resume()
        wait_until_gone(trainer)
    whole.check()
    with Repro(whole.project) as repro:
        assert repro.first_step == MAX_STEPS
        repro.finish()
    whole.check()


def _is_whole(name: str) -> bool:
    return not name.endswith(".partial")


def _step_of(state: str) -> int:
    return int(state.removeprefix("step-").removesuffix(".partial"))


def _run_folder(project: Path) -> Path | None:
    """The folder of the run's saved states, once a trainer has locked it."""
    return next((owner.parent for owner in project.glob(".dvc/tmp/resume/*/owner.json")), None)


def _names_in(folder: Path | None) -> set[str]:
    """The states or checkpoints in a folder, half-written ones too; none where there is no folder."""
    with suppress(FileNotFoundError):
        return {name for name in os.listdir(folder) if name.startswith("step-")} if folder else set()
    return set()

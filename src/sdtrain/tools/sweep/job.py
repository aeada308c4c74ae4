"""A task's place in a sweep: its run of DVC, its lock, and what its log says."""

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json
from sdtrain.params.machine import SWEEP_TASK
from sdtrain.tools.sweep.failures import forget_failure
from sdtrain.tools.sweep.git import find_experiment, how_it_differs
from sdtrain.tools.sweep.grid import Task
from sdtrain.tools.sweep.starts import has_started, lock_of, log_of, try_lock

State = Literal["waiting", "running", "done", "failed", "skipped"]

_LOCK_ERRORS = ("Unable to acquire lock", "is busy, it is being blocked by")
"""How DVC says that another of its commands is using the project."""
_STAGE = re.compile(r"^Running stage '(?:dvc\.yaml:)?([^']+)'", re.MULTILINE)
_SAME_SUMS = ("micro_batch_size", "gradient_checkpointing")
"""How training's sums are split, of which a run may have any."""
_TAIL_BYTES = 1 << 13
_NUM_LAST_LINES = 10


class Job:
    """A task of a sweep.

    Args:
        head: the commit that its experiment is made on.
        workspace: a commit with the params and code that it runs with.
    """

    def __init__(self, task: Task, head: str, workspace: str) -> None:
        self.task, self._head, self._workspace = task, head, workspace
        self.state: State = "waiting"
        self.note = ""
        self.stage = ""
        self.process: subprocess.Popen | None = None
        self._lock: int | None = None
        self._asked: set[int] = set()
        self._began = self._seconds = 0.0

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self._began if self.state == "running" else self._seconds

    def trains_as(self, other: "Job") -> bool:
        """Whether both would train the same run, which only one at a time may; the second takes the first's result."""
        return self._training() == other._training()

    def _training(self) -> dict:
        """The params that can change what is trained."""
        params = self.task.params.model_dump(exclude={"export", "sample", "evaluate", "validation"})
        return params | {"train": {k: v for k, v in params["train"].items() if k not in _SAME_SUMS}}

    def difference(self) -> str | None:
        """In what its experiment differs from what it should be, empty if in nothing; None if there is none."""
        experiment = find_experiment(self.name, self._head)
        return None if experiment is None else how_it_differs(experiment, self.task.params, self._workspace)

    def skip_if_done(self) -> None:
        """Skip the task if its experiment is there.

        Raises:
            InputError: an experiment of its name was made of something else.
        """
        difference = self.difference()
        if difference:
            raise InputError(
                f"there is an experiment {self.name} of this commit with other content: {difference}; name this sweep "
                f"with --name, or remove the experiment: dvc exp remove {self.name}"
            )
        if difference is not None:
            self.state, self.note = "skipped", ""

    def take(self) -> bool:
        """Lock the task for this sweep; False if it is being run, or processes of a killed run are still ending.

        Such processes are asked to stop: without their dvc nobody takes what they make; a trainer saves its state.
        """
        lock = try_lock(lock_of(self.name))
        if lock is None:
            self.note = "is run by another sweep"
            return False
        self._lock = lock
        if self._stop_leftovers():
            self.release()
            return False
        self._remove_copies()
        return True

    def release(self) -> None:
        """Let other sweeps have the task."""
        assert self._lock is not None, f"{self.name} isn't locked"
        os.close(self._lock)
        self._lock = None

    def start(self) -> None:
        """Start its DVC, which inherits the lock, so that the task stays locked if this sweep is killed."""
        assert self._lock is not None, f"{self.name} isn't locked"
        command = ["dvc", "exp", "run", "--temp", "--name", self.name]
        for override in self.task.overrides:
            command += ["--set-param", override]
        forget_failure(self.name)
        with log_of(self.name).open("wb") as log:
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that Ctrl-C reaches it through the sweep only
                    pass_fds=[self._lock],
                    env={**os.environ, SWEEP_TASK: str(lock_of(self.name).absolute()), "PYTHONUNBUFFERED": "1"},
                )
            except FileNotFoundError:
                raise InputError(
                    "dvc: no such command; activate the environment in which sdtrain is installed"
                ) from None
        self.state, self.note, self.stage, self._began = "running", "", "", time.monotonic()

    def settle(self) -> bool:
        """If its DVC has ended, find out how; False while processes of it still run."""
        assert self.process is not None, f"{self.name} wasn't started"
        status = self.process.poll()
        if status is None:
            self._read_log()
            return False
        if status < 0:
            if self._stop_leftovers():
                return False
            self._remove_copies()
        self._seconds = self.seconds
        difference, text = self.difference(), self._tail()
        if difference == "":
            self.state, self.note = "done", ""
        elif difference:
            self.state, self.note = "failed", f"its experiment isn't what it should be: {difference}"
        elif not has_started(self.name) and any(error in text for error in _LOCK_ERRORS):
            self.state, self.note = "waiting", "another command uses DVC"
        elif status == 0:
            self.state, self.note = "failed", "dvc ended well, but made no experiment"
        else:
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
            self.state, self.note = "failed", f"dvc {how}"
        self.process = None
        self.release()
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all processes of its DVC; SIGKILL also to those that have left its group."""
        assert self.process is not None, f"{self.name} wasn't started"
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            for process in self._processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def last_lines(self) -> list[str]:
        """The end of its log."""
        return _lines(self._tail())[-_NUM_LAST_LINES:]

    def _read_log(self) -> None:
        text = self._tail()
        if stages := _STAGE.findall(text):
            self.stage = stages[-1]
        self.note = next(iter(_lines(text)[-1:]), "")

    def _tail(self) -> str:
        try:
            with log_of(self.name).open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _processes(self) -> list[psutil.Process]:
        lock = str(lock_of(self.name).absolute())
        found = psutil.process_iter(["environ"])
        return [process for process in found if (process.info["environ"] or {}).get(SWEEP_TASK) == lock]

    def _stop_leftovers(self) -> bool:
        """Ask processes whose dvc is dead to stop; whether there are any."""
        processes = self._processes()
        for process in processes:
            if process.pid not in self._asked:
                self._asked.add(process.pid)
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGINT)
        if processes:
            self.note = f"waits for processes of a killed run: {', '.join(str(process.pid) for process in processes)}"
        return bool(processes)

    def _remove_copies(self) -> None:
        """Delete the copies of the project that killed runs of this task left, and what DVC noted of them.

        A DVC that was killed before it wrote its note leaves a folder without one, and `dvc exp show` fails over it.
        """
        for path in Path(".dvc/tmp/exps/run").glob("*/*.run"):
            with suppress(InputError):  # a run that was killed while it wrote this file
                run = read_json(path)
                if run["name"] == self.name and Path(run["root_dir"]).parent.name == "standalone":
                    shutil.rmtree(run["root_dir"], ignore_errors=True)
                    shutil.rmtree(Path(run["root_dir"]).parent / "run" / path.stem, ignore_errors=True)


def _lines(text: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]

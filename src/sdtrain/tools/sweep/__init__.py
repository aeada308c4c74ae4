"""Every combination of some params' values as DVC experiments, several at once.

Each task is one `dvc exp run --temp`, so what a sweep makes is shown, applied, branched and pushed by DVC as any
experiment. Whether a task is done is read from its experiment; so a sweep that ended, however it did, resumes when the
same command is given again. A task is locked while it runs, by the file that its DVC inherits, so that two sweeps, or
what a killed one left running, never run it twice at the same time.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdtrain.ground.errors import InputError
from sdtrain.ground.git import head_commit
from sdtrain.ground.gpus import visible_gpus
from sdtrain.params.machine import launch_numbers
from sdtrain.tools.sweep import starts
from sdtrain.tools.sweep.failures import note_failure
from sdtrain.tools.sweep.git import PARAMS, changed_between, workspace_commit
from sdtrain.tools.sweep.grid import plan_tasks
from sdtrain.tools.sweep.job import Job
from sdtrain.tools.sweep.progress import counts, showing

_POLL_S = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class SweepResult:
    """The names of a sweep's experiments that are there, and of the tasks that failed, in the tasks' order."""

    experiments: list[str]
    failed: list[str]


def run_sweep(
    assignments: list[str], *, num_jobs: int | None = None, prefix: str | None = None, dry_run: bool = False
) -> SweepResult:
    """Run all combinations of `key=value,value…` assignments; a task that fails doesn't stop the others.

    Args:
        num_jobs: tasks at once; by default as many as GPUs allow, with `NPROC` for each task, or 1 without GPUs.
        prefix: begins the experiments' names.
        dry_run: only say what would run.

    Raises:
        InputError: a combination isn't valid, an experiment of a task's name was made of something else, or code or
            params were changed before all tasks had started.
        SystemExit: 128 + the signal's number, on SIGINT or SIGTERM, once the running tasks have stopped.
    """
    if not Path(".dvc").is_dir():
        raise InputError(f"{Path.cwd()} isn't a DVC project; run the command from the project's root")
    while (start := starts.try_begin()) is None:
        time.sleep(_POLL_S)
    try:
        head, workspace = head_commit(Path()), workspace_commit()
        jobs = [Job(task, head, workspace) for task in plan_tasks(assignments, Path(PARAMS), prefix)]
        for job in jobs:
            job.skip_if_done()
    finally:
        starts.end(start)
    num_jobs = num_jobs or max(1, len(visible_gpus()) // launch_numbers()[0])
    print(f"tasks: {len(jobs)} ({counts(jobs)}), {num_jobs} at once; logs are in {starts.FOLDER}", flush=True)
    if dry_run:
        for job in jobs:
            print(f"{job.name}: {job.state}: {' '.join(job.task.overrides)}")
    else:
        _Sweep(jobs, num_jobs, head, workspace).run()
    return SweepResult(
        experiments=[job.name for job in jobs if job.state in ("done", "skipped")],
        failed=[job.name for job in jobs if job.state == "failed"],
    )


class _Sweep:
    """Jobs that run, at most `num_jobs` at once."""

    def __init__(self, jobs: list[Job], num_jobs: int, head: str, workspace: str) -> None:
        self._jobs, self._num_jobs, self._head, self._workspace = jobs, num_jobs, head, workspace
        self._starting: tuple[Job, int] | None = None
        self._signals: list[signal.Signals] = []
        self._num_sent = 0
        self._fault = ""

    def run(self) -> None:
        """Run all jobs that wait, to their end; raises as `run_sweep`."""
        with self._watching(), showing(self._jobs) as progress:
            while self._running() or (self._waiting() and self._may_start()):
                self._turn()
                progress.show()
                time.sleep(_POLL_S)
        print(counts(self._jobs), flush=True)
        for job in self._jobs:
            if job.state == "failed":
                lines = job.last_lines()
                print("\n".join(["", f"{job.name} failed: {job.note}; {starts.log_of(job.name)} ends with", *lines]))
        if self._signals:
            print("the same command resumes the sweep", file=sys.stderr)
            sys.exit(128 + self._signals[0])
        if self._fault:
            raise InputError(f"{self._fault}; tasks not started: {len(self._waiting())}")

    def _turn(self) -> None:
        for job in self._running():
            if job.settle() and job.state == "failed":
                if self._signals:
                    job.state, job.note = "waiting", "stopped"
                else:
                    note_failure(job.name, self._head, job.note, job.last_lines())
        if self._starting is not None:
            job, start = self._starting
            if job.state != "running" or starts.has_started(job.name):
                starts.end(start)
                self._starting = None
        self._pass_signals()
        if self._may_start() and self._starting is None and len(self._running()) < self._num_jobs:
            self._start_next()

    def _start_next(self) -> None:
        """Start the first waiting task that isn't done, nor run by another sweep."""
        start = starts.try_begin()
        if start is None:
            return
        try:
            running = self._running()
            for job in self._waiting():
                if any(job.trains_as(other) for other in running):
                    job.note = "waits for a task that trains the same"
                elif job.take() and self._start(job):
                    self._starting = (job, start)
                    return
                if self._fault:
                    break
        except InputError as error:  # of git or DVC; what runs comes to its end
            self._fault = str(error)
        starts.end(start)

    def _start(self, job: Job) -> bool:
        try:
            job.skip_if_done()
        except InputError as error:
            job.state, job.note = "failed", str(error)
        if job.state == "waiting":
            workspace = workspace_commit()
            self._fault = self._changes(workspace)
            if not self._fault:
                starts.write_journal(job.name, workspace)
                job.start()
                return True
        job.release()
        return False

    def _changes(self, workspace: str) -> str:
        """What of the code and params isn't as when the sweep began: tasks that start now couldn't be compared."""
        if (head := head_commit(Path())) != self._head:
            return f"HEAD was {self._head[:12]} when the sweep began, and is {head[:12]} now"
        changed = changed_between(self._workspace, workspace)
        return f"{', '.join(changed)} changed since the sweep began" if changed else ""

    def _pass_signals(self) -> None:
        """Stop the running jobs on the first signal, but none in its start; kill them on the second."""
        if len(self._signals) > 1 and self._num_sent < 2:
            self._num_sent = 2
            for job in self._running():
                job.send(signal.SIGKILL)
        elif self._signals and self._num_sent == 0 and self._starting is None:
            self._num_sent = 1
            print(f"{self._signals[0].name}: stops the running tasks; once more kills them", file=sys.stderr)
            for job in self._running():
                job.send(signal.SIGINT)

    def _may_start(self) -> bool:
        return not self._signals and not self._fault

    def _running(self) -> list[Job]:
        return [job for job in self._jobs if job.state == "running"]

    def _waiting(self) -> list[Job]:
        return [job for job in self._jobs if job.state == "waiting"]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Within the context signals are noted, and don't end this process."""
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._signals.append(signal.Signals(number))

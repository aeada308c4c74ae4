"""A sweep's tasks in one process: what a terminal shows of them, and what is left of killed ones."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from sdtrain.params.schema import Params
from sdtrain.tools.sweep.failures import failures_of, forget_failure, note_failure
from sdtrain.tools.sweep.grid import Task
from sdtrain.tools.sweep.job import Job
from sdtrain.tools.sweep.progress import showing


class Terminal(io.StringIO):
    """Where prints go."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def jobs() -> list[Job]:
    return [Job(Task(f"seed-{seed}", (f"train.seed={seed}",), Params.model_construct()), "", "") for seed in range(3)]


def test_a_terminal_has_a_table_of_the_tasks(jobs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", Terminal())
    with showing(jobs) as progress:
        jobs[0].state, jobs[0].stage, jobs[0].note = "running", "train", "[markup] is no markup: 3/10"
        jobs[1].state, jobs[1].note = "failed", "out of memory"
        progress.show()
    lines = [re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line).split() for line in sys.stdout.getvalue().splitlines()]
    assert ["task", "state", "time", "stage", "last", "line", "of", "its", "log"] in lines
    *_, running = [line for line in lines if line[:2] == ["seed-0", "running"]]
    assert running[-6:] == ["train", "[markup]", "is", "no", "markup:", "3/10"]
    assert ["seed-1", "failed", "out", "of", "memory"] in lines
    assert ["1", "waiting,", "1", "running,", "1", "failed"] in lines


def test_what_dvc_noted_of_a_tasks_killed_run_goes_with_its_copy(jobs, tmp_path, monkeypatch):
    """A DVC that is killed between a folder and the note in it leaves it empty, and `dvc exp show` fails over that."""
    monkeypatch.chdir(tmp_path)
    exps = Path(".dvc/tmp/exps").absolute()
    for name in ("seed-0", "other"):
        copy, noted = exps / "standalone" / f"copy-{name}", exps / "run" / name
        for folder in (copy, noted, exps / "standalone" / "run" / name):
            folder.mkdir(parents=True)
        (noted / f"{name}.run").write_text(json.dumps({"name": name, "root_dir": str(copy)}))
    assert jobs[0].take()
    jobs[0].release()
    assert {path.name for path in exps.glob("standalone/copy-*")} == {"copy-other"}
    assert {path.name for path in exps.glob("standalone/run/*")} == {"other"}


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["> python -m stages.train", "step 250", "error: the loss isn't finite", "one more line", "ERROR: failed"],
         "the loss isn't finite"),
        (["Traceback (most recent call last):", '  File "x", line 1', "ValueError: no", "ERROR: failed"],
         "ValueError: no"),
        (["ERROR: failed"], "dvc ended with exit code 255"),
    ],
    ids=["a stage's own error", "a traceback", "nothing of its own"],
)  # fmt: skip
def test_a_failure_is_noted_with_its_cause_until_the_task_starts_again(tmp_path, monkeypatch, lines, cause):
    monkeypatch.chdir(tmp_path)
    note_failure("lr-0.2", "abc", "dvc ended with exit code 255", lines)
    assert failures_of(tmp_path, "abc") == {"lr-0.2": f"its task failed: {cause} (.dvc/tmp/sweep/lr-0.2.log)"}
    assert failures_of(tmp_path, "def") == {}
    forget_failure("lr-0.2")
    assert failures_of(tmp_path, "abc") == {}

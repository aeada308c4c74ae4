"""Leases on GPUs: real processes and locks, and an `nvidia-smi` that lists made-up devices."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from sdtrain.ground.errors import InputError
from sdtrain.ground.gpus import lease_gpus, visible_gpus
from tests.conftest import ROOT

TWO = """\
GPU 0: NVIDIA L4 (UUID: GPU-aa11)
GPU 1: NVIDIA L4 (UUID: GPU-ab22)
"""
DIVIDED = """\
GPU 0: NVIDIA L4 (UUID: GPU-aa11)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-cc33)
  MIG 1g.10gb     Device  0: (UUID: MIG-d1)
  MIG 1g.10gb     Device  1: (UUID: MIG-d2)
"""
JOB = """\
import os, sys
from sdtrain.ground.gpus import lease_gpus
lease_gpus(int(sys.argv[1]))
print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
"""
HOLD = JOB + "sys.stdin.read()\n"


class Machine:
    """A machine with made-up GPUs, whose jobs all end with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, []
        (folder / "bin").mkdir()
        self.env = {
            **{name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "NPROC")},
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
            "TMPDIR": str(folder),
        }
        self.lists(TWO)

    def lists(self, devices: str, status: int = 0) -> None:
        program = self.folder / "bin" / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat << END\n{devices}END\nexit {status}\n")
        program.chmod(0o755)

    def start(self, num: int = 1, code: str = HOLD, **environment: str) -> subprocess.Popen:
        """A job that leases `num` GPUs, prints what CUDA may see, and holds them until its input ends."""
        job = subprocess.Popen(
            [sys.executable, "-c", code, str(num)],
            env=self.env | environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.jobs.append(job)
        return job


@pytest.fixture
def machine(tmp_path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    for job in machine.jobs:
        job.kill()
        job.communicate()


@pytest.fixture
def visible(machine, monkeypatch) -> Callable[[str | None], list[str]]:
    """A function from CUDA_VISIBLE_DEVICES (None: unset) to the UUIDs of the devices that may be leased."""
    monkeypatch.setenv("PATH", machine.env["PATH"])
    monkeypatch.setattr(tempfile, "tempdir", machine.env["TMPDIR"])

    def see(value: str | None) -> list[str]:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if value is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        return [gpu.uuid for gpu in visible_gpus()]

    return see


def leased(job: subprocess.Popen) -> str:
    return job.stdout.readline().strip()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ["GPU-aa11", "GPU-ab22"]),
        ("", []),
        ("-1", []),
        ("1", ["GPU-ab22"]),
        ("1, 0", ["GPU-ab22", "GPU-aa11"]),
        ("1,7,0", ["GPU-ab22"]),  # what follows an invalid entry isn't seen
        ("0,0", []),
        ("GPU-ab", ["GPU-ab22"]),
        ("GPU-ab22,GPU-aa11", ["GPU-ab22", "GPU-aa11"]),
        ("GPU-a", []),  # not unique
        ("GPU-ff", []),
        ("none", []),
    ],
)
def test_only_what_cuda_may_see_is_leased(visible, value, expected):
    assert visible(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ["GPU-aa11", "MIG-d1", "MIG-d2"]),
        ("1", ["MIG-d1", "MIG-d2"]),
        ("GPU-cc33", ["MIG-d1", "MIG-d2"]),
        ("MIG-d2,0", ["MIG-d2", "GPU-aa11"]),
        ("MIG-d", []),
    ],
)
def test_a_divided_gpu_is_leased_by_the_slice(visible, machine, value, expected):
    machine.lists(DIVIDED)
    assert visible(value) == expected


@pytest.mark.parametrize("broken", ["missing", "failing"])
def test_without_gpus_nothing_happens(visible, machine, monkeypatch, capfd, broken):
    if broken == "missing":
        (machine.folder / "bin" / "nvidia-smi").unlink()
        monkeypatch.setenv("PATH", str(machine.folder / "bin"))
    else:
        machine.lists(TWO, status=9)
    assert visible(None) == []
    lease_gpus(4)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert capfd.readouterr() == ("", "")
    assert not (machine.folder / "sdtrain-gpus").exists()


def test_jobs_get_different_gpus_and_say_which(machine):
    first, second = machine.start(), machine.start()
    assert {leased(first), leased(second)} == {"GPU-aa11", "GPU-ab22"}
    _, printed = first.communicate("")
    assert printed in {f"leased GPU {i} (NVIDIA L4, {uuid})\n" for i, uuid in enumerate(("GPU-aa11", "GPU-ab22"))}


def test_who_waits_says_for_whom_and_gets_what_a_killed_job_held(machine):
    first, second = machine.start(), machine.start()
    held = {leased(first): first, leased(second): second}
    third = machine.start()
    said = third.stderr.readline()
    for index, uuid in enumerate(sorted(held)):
        assert f"GPU {index} is held by process {held[uuid].pid} in {Path.cwd()}" in said
    second.send_signal(signal.SIGKILL)
    assert held[leased(third)] is second


def test_a_job_that_wants_two_holds_none_while_it_waits_for_the_second(machine):
    one = machine.start()
    assert leased(one) == "GPU-aa11"
    two = machine.start(2)
    assert two.stderr.readline().startswith(f"waits for 2 of 2 GPUs; GPU 0 is held by process {one.pid}")
    other = machine.start()
    assert leased(other) == "GPU-ab22"
    for job in (one, other):
        job.communicate("")
    assert leased(two) == "GPU-aa11,GPU-ab22"


def test_many_jobs_that_want_one_or_two_never_share_and_all_end(machine):
    """Each says when it has which devices; the spans of a device don't overlap."""
    code = JOB.replace(
        "print(", "import time; begun = time.monotonic(); time.sleep(0.01); print(begun, time.monotonic(), "
    )
    code = code.replace("import os, sys", "import os, sys, sdtrain.ground.gpus as gpus; gpus._POLL_S = 0.02", 1)
    jobs = [machine.start(num, code) for num in (1, 2, 1, 2, 2, 1, 1, 2)]
    spans = []
    for job, num in zip(jobs, (1, 2, 1, 2, 2, 1, 1, 2), strict=True):
        printed, said = job.communicate(timeout=60)
        begun, ended, uuids = printed.split()
        assert len(uuids.split(",")) == num, said
        spans += [(uuid, float(begun), float(ended)) for uuid in uuids.split(",")]
    for uuid in ("GPU-aa11", "GPU-ab22"):
        ordered = sorted((begun, ended) for name, begun, ended in spans if name == uuid)
        assert len(ordered) >= 4
        assert all(ended <= begun for (_, ended), (begun, _) in pairwise(ordered))


def test_more_than_there_are_is_refused_with_both_numbers(visible, machine):
    visible("1")
    with pytest.raises(InputError, match=r"NPROC = 2: .* may use 1 \(CUDA_VISIBLE_DEVICES = 1\); lower NPROC"):
        lease_gpus(2)


def test_slices_are_no_gpus_for_several_processes(visible, machine):
    machine.lists(DIVIDED)
    visible(None)
    with pytest.raises(InputError, match=r"NPROC = 2: .* may use 1 \(CUDA_VISIBLE_DEVICES = unset\)"):
        lease_gpus(2)


def test_a_lease_outlives_exec_and_the_launcher_while_a_worker_lives(machine):
    """As under torchrun: the launcher is exec'd, starts a worker that shares the lease, and is killed."""
    worker = f"import os; os.environ['TORCHELASTIC_RUN_ID'] = 'x'\n{HOLD}"
    launcher = (
        "import subprocess, sys; worker = subprocess.Popen([sys.executable, '-c', sys.argv[1], '1']); "
        "print(worker.pid, flush=True); worker.wait()"
    )
    code = f"{JOB}os.execv(sys.executable, [sys.executable, '-c', {launcher!r}, {worker!r}])\n"
    job = machine.start(1, code, CUDA_VISIBLE_DEVICES="0")
    assert leased(job) == "GPU-aa11"
    worker_pid = int(leased(job))
    assert leased(job) == "GPU-aa11", "the worker's own"
    job.kill()
    job.wait()
    waiting = machine.start(CUDA_VISIBLE_DEVICES="0")
    assert waiting.stderr.readline().startswith("waits for 1 of 1 GPUs")
    os.kill(worker_pid, signal.SIGKILL)
    assert leased(waiting) == "GPU-aa11"


def test_a_worker_of_someone_elses_launch_leases_nothing(machine):
    job = machine.start(2, CUDA_VISIBLE_DEVICES="1", TORCHELASTIC_RUN_ID="by-hand")
    assert leased(job) == "1"
    assert leased(machine.start(2)) == "GPU-aa11,GPU-ab22"


def test_lock_files_are_open_to_all_users(machine):
    leased(machine.start(code=f"import os; os.umask(0o077)\n{HOLD}"))
    folder = machine.folder / "sdtrain-gpus"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        "GPU-aa11.lock": 0o666,
        "picking.lock": 0o666,
    }


def test_a_folder_that_cannot_be_used_is_named(visible, machine):
    (machine.folder / "sdtrain-gpus").write_text("a file")
    visible("0")
    with pytest.raises(InputError, match=r"sdtrain-gpus/picking.lock: can't be opened to lease a GPU: Not a directory"):
        lease_gpus()

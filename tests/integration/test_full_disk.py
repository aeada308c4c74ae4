"""A full disk stops a run in one line, costs it nothing that was saved, and leaves nothing half written."""

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import yaml
from safetensors import SafetensorError
from tensorboard.summary.writer.record_writer import RecordWriter

import stages
from sdtrain.ground import files
from sdtrain.ground.errors import DiskFullError
from sdtrain.ground.files import PARTIAL, disk_errors_explained, new_folder, write_json, write_text
from sdtrain.methods import checkpoints
from sdtrain.training import states
from tests.conftest import ROOT, shrunk_tree
from tests.integration.test_resume import assert_same

SHORT = {"max_steps": 2, "save_every_n_steps": 1}
TOLD = r"no space left on the disk, or in your quota, to write .*free some space, then run the same command again"


def no_space(path) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class FillingDisk:
    """Each write of a run fails the first time that it is tried, halfway; `failed` names those that have."""

    def __init__(self, monkeypatch, folder: Path, names: set[str]) -> None:
        self.failed, self.told = [], False
        self._folder, self._patch, self._names = folder, monkeypatch, names
        for module in (states, safetensors.torch):
            self._replace(
                module, "save_file", 1, lambda p: SafetensorError(f"I/O error: {os.strerror(28)} (os error 28)")
            )
        self._replace(Path, "mkdir", 0, no_space)
        self._replace(Path, "write_bytes", 0, no_space)
        self._replace(
            checkpoints.shutil, "copytree", 1, lambda p: shutil.Error([("a", str(p), f"[Errno 28] {os.strerror(28)}")])
        )
        self._replace(files, "_flush", 0, no_space)

    def _replace(self, owner, name: str, place: int, error) -> None:
        original = getattr(owner, name)
        if name not in self._names:
            return

        def function(*arguments, **keywords):
            path = Path(arguments[place])
            if path.absolute().is_relative_to(self._folder) and not self.told:
                site = f"{name} {path.relative_to(self._folder)}"
                site = re.sub(r"\d{8}-\d{6}-repro", "RUN", site)
                site = re.sub(r"(_flush .*)/[^/]*$", r"\1", site)  # one file of each folder
                if site not in self.failed:
                    self.failed.append(site)
                    self.told = True  # cleaning up writes nothing that may fail, too
                    if name == "write_bytes":
                        original(path, arguments[1][: len(arguments[1]) // 2])
                    elif name == "save_file":
                        path.write_text("half")
                    raise error(path)
            return original(*arguments, **keywords)

        self._patch.setattr(owner, name, function)


def ended(main) -> str | None:
    """What a stage says as it fails; None where it doesn't."""
    try:
        stages.run(main)
    except SystemExit as stopped:
        return stopped.code
    return None


@pytest.mark.parametrize(
    "names",
    [
        {"save_file", "copytree"},
        pytest.param({"save_file", "copytree", "mkdir", "write_bytes", "_flush"}, marks=pytest.mark.full),
    ],
    ids=["weights", "all"],
)
def test_every_write_of_a_run_may_fail_once(workspace, tmp_path, monkeypatch, names):
    """Run after run, each gets one write further than the last; the end is that of a run that nothing stopped."""
    workspace.train(tmp_path / "whole", train=SHORT)
    out = tmp_path / "filling"
    with monkeypatch.context() as patch:
        disk = FillingDisk(patch, out, names)
        while True:
            disk.told = False
            told = ended(lambda: workspace.train(out, train=SHORT))
            if told is None:
                break
            assert re.fullmatch(f"error: {TOLD}", told)
            assert disk.told
            workspace.release_locks()
            assert not list(out.rglob(f"*{PARTIAL}*")), disk.failed[-1]
            assert len(disk.failed) < 200
    assert not disk.told
    text = "\n".join(disk.failed)
    for site in (
        r"write_bytes resume/\w+/owner.json", r"save_file resume/\w+/step-00000001.*weights", r"save_file .*optimizer",
        r"write_bytes .*state.json", r"write_bytes resume.*step.*SHA256SUMS", r"_flush resume/\w+/step",
        r"save_file resume/\w+/checkpoints/.*ema", r"copytree checkpoints.*/best", r"save_file checkpoints.*last",
        r"write_bytes train.csv", r"write_bytes train.json", r"write_bytes resume/\w+/finished.json",
    ):  # fmt: skip
        assert re.search(site, text) or site.partition(" ")[0] not in names, text
    assert_same(out, tmp_path / "whole")


def test_a_state_that_does_not_fit_says_how_large_it_is_and_what_is_safe(workspace, tmp_path, monkeypatch):
    original = states.save_file

    def save_file(tensors, path):
        if "step-00000002" in str(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(tensors, path)

    monkeypatch.setattr(states, "save_file", save_file)
    with pytest.raises(DiskFullError) as caught:
        workspace.train(tmp_path, train=SHORT)
    pattern = (
        r"to write the state after step 2, \S+/step-00000002 \(needs 43\.\d\d MiB, \d+\.\d\d [GM]iB are free\); "
        r"the last good state is \S+/step-00000001; free some space"
    )
    assert re.search(pattern, str(caught.value))


@pytest.mark.parametrize(
    "error",
    [
        no_space("a"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "a"),
        shutil.Error([("a", "b", f"[Errno 28] {os.strerror(errno.ENOSPC)}: 'b'")]),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_a_full_disk_is_known_by_any_library_s_error(tmp_path, error):
    def write() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(
        DiskFullError, match=rf"to write {tmp_path}/out \(.* are free\); nothing that was written before"
    ):
        write()
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=r"error: no space left on the disk"):
        stages.run(lambda: (_ for _ in ()).throw(error))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), SafetensorError("broken"), ValueError("broken")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error), match="broken") as caught, disk_errors_explained("it", tmp_path):
        raise error
    assert caught.value is error
    with pytest.raises(type(error), match="broken"):
        stages.run(lambda: (_ for _ in ()).throw(error))


def test_the_outer_words_hold_and_the_inner_ones_fill_in(tmp_path):
    with (
        pytest.raises(
            DiskFullError, match=r"to write the state \(needs 3.00 GiB, .* are free\); all is safe; free some"
        ),
        disk_errors_explained(safe=lambda: "all is safe"),
        disk_errors_explained("the state", tmp_path, 3 << 30),
        disk_errors_explained("a file", tmp_path, 1, lambda: "something is"),
    ):
        raise no_space("a")


@pytest.mark.parametrize("write", [lambda path: write_text(path, "text"), lambda path: write_json(path, {})])
def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path, monkeypatch, write):
    path = tmp_path / "a"
    path.write_text("old")
    original = Path.write_bytes

    def half(self, content):
        original(self, content[:1])
        raise no_space(self)

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(DiskFullError, match=rf"to write {path} \("):
        write(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_tensorboard_s_thread_ends_the_run_in_one_line(workspace, tmp_path, monkeypatch, capfd):
    workspace.train(tmp_path / "whole", train=SHORT)
    original, calls = RecordWriter.write, []

    def write(self, data):
        calls.append(data)
        if len(calls) > 5:
            raise no_space("events.out")
        original(self, data)

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", write)
        with pytest.raises(SystemExit, match=TOLD):
            stages.run(lambda: workspace.train(tmp_path / "run", train=SHORT))
    assert "Traceback" not in capfd.readouterr().err
    workspace.release_locks()
    workspace.train(tmp_path / "run", train=SHORT)
    assert_same(tmp_path / "run", tmp_path / "whole")


FILL = """
import os, shutil, stages, stages.train
from sdtrain import train
original, made, left = train.optimizer_step, [], {left}
def step(*arguments):
    made.append(1)
    if len(made) == 2:
        free = shutil.disk_usage(".").free - left
        with open("ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free)
    return original(*arguments)
train.optimizer_step = step
stages.run(stages.train.main)
"""
"""The stage `train`; before its second step, another program leaves that many bytes of the disk."""


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize("left_mib", [20, *(pytest.param(left, marks=pytest.mark.full) for left in (0, 44, 70))])
def test_a_disk_that_fills_while_a_run_works(workspace, small_disk, left_mib):
    """States are of 43 MiB, checkpoints of 22."""
    (small_disk / "data").mkdir()
    for name in ("base", "latents"):
        (small_disk / "data" / name).symlink_to(getattr(workspace, name))
    (small_disk / "params.yaml").write_text(yaml.safe_dump(shrunk_tree(train={**SHORT, "max_steps": 4})))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *command], cwd=small_disk, env=environment, capture_output=True, text=True
        )

    stopped = run("-c", FILL.format(left=left_mib << 20))
    assert stopped.returncode == 1, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "Exception ignored" not in stopped.stderr
    (line,) = [line for line in stopped.stderr.splitlines() if "error:" in line]
    assert re.search(TOLD, line)
    assert "the last good state is " in line
    assert not list(small_disk.rglob(f"*{PARTIAL}"))
    (small_disk / "ballast").unlink()
    resumed = run("-m", "stages.train")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumes from step" in resumed.stdout
    ours = {
        p.relative_to(small_disk): p.read_bytes() for p in (small_disk / "data/checkpoints").rglob("*") if p.is_file()
    }
    shutil.rmtree(small_disk / "data" / "checkpoints")
    shutil.rmtree(small_disk / ".dvc")
    assert run("-m", "stages.train").returncode == 0
    assert ours == {name: (small_disk / name).read_bytes() for name in ours}

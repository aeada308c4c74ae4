"""The stages that share their work, under the real `dvc`."""

import pytest

from tests.e2e.project import Project


@pytest.mark.full
def test_two_processes_leave_what_dvc_lock_has_of_one(tmp_path):
    sizes = {"sample": {"batch_size": 1}, "evaluate": {"batch_size": 3}}
    project = Project(tmp_path / "project", train={"micro_batch_size": 2}, **sizes)
    project.env["OMP_NUM_THREADS"] = "1"
    project.run("dvc repro")
    lock = (project.folder / "dvc.lock").read_text()
    project.env["NPROC"] = "2"
    project.run("dvc repro --force --single-item precompute sample evaluate")
    assert (project.folder / "dvc.lock").read_text() == lock

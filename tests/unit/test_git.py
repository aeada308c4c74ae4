"""Reading revisions and DVC's experiments with git alone."""

import subprocess
from pathlib import Path

import pytest

from sdtrain.ground.errors import InputError
from sdtrain.ground.git import experiments, head_commit, read_files, resolve


@pytest.fixture
def repo(tmp_path):
    """Two commits, the second checked out, and a side branch."""
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    commit(tmp_path, {"params.yaml": b"lr: 1\n"})
    metrics = {"metrics/a.json": b"{}", "metrics/b.bin": b"\n\x00\nblob 3\n"}
    commit(tmp_path, {"params.yaml": b"lr: 2\n", "x": b"", **metrics})
    return tmp_path


def git(root: Path, *arguments: str) -> str:
    names = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *names, *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    git(root, "add", "-A")
    git(root, "commit", "--quiet", "--allow-empty", "-m", "c")
    return git(root, "rev-parse", "HEAD")


def make_experiment(root: Path, name: str, baseline: str) -> str:
    """A commit beside the branch, under the ref that DVC gives it."""
    commit_id = git(root, "commit-tree", "-p", baseline, "-m", name, f"{baseline}^{{tree}}")
    git(root, "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}", commit_id)
    return commit_id


def test_experiments_are_found_among_dvcs_other_refs(repo):
    head, before = head_commit(repo), git(repo, "rev-parse", "HEAD~1")
    made = {(name, at): make_experiment(repo, name, at) for name, at in (("b", head), ("a", head), ("a", before))}
    for ref in ("stash", "exec/EXEC_HEAD", f"temp/{head}", "celery/stash"):
        git(repo, "update-ref", f"refs/exps/{ref}", head)
    found = {(one.name, one.baseline): one.commit for one in experiments(repo)}
    assert found == made


def test_revisions_of_all_kinds(repo):
    head, before = head_commit(repo), git(repo, "rev-parse", "HEAD~1")
    experiment = make_experiment(repo, "lr-2", head)
    git(repo, "tag", "-a", "-m", "annotated", "v1", before)
    git(repo, "branch", "side", before)
    for rev, expected in {"lr-2": experiment, "v1": before, "side": before, before[:8]: before, "HEAD": head}.items():
        assert resolve(repo, rev) == expected


def test_an_experiment_of_this_commit_wins_over_others_and_over_a_branch(repo):
    head, before = head_commit(repo), git(repo, "rev-parse", "HEAD~1")
    make_experiment(repo, "same", before)
    here = make_experiment(repo, "same", head)
    git(repo, "branch", "same", before)
    assert resolve(repo, "same") == here


def test_a_name_of_several_other_commits_is_ambiguous(repo):
    first, second = git(repo, "rev-parse", "HEAD~1"), head_commit(repo)
    made = [make_experiment(repo, "same", at) for at in (first, second)]
    commit(repo, {})
    with pytest.raises(InputError, match="2 experiments have this name") as caught:
        resolve(repo, "same")
    assert all(text[:7] in str(caught.value) for text in (first, second, *made))


def test_an_unknown_revision_names_the_nearest_experiments(repo):
    make_experiment(repo, "lr-0.002", head_commit(repo))
    make_experiment(repo, "other", head_commit(repo))
    with pytest.raises(InputError, match=r"lr-0\.02: no experiment, branch, tag or commit .* nearest is lr-0\.002$"):
        resolve(repo, "lr-0.02")
    with pytest.raises(InputError, match=r"--all: .* there are lr-0\.002, other$"):
        resolve(repo, "--all")


def test_files_are_read_as_they_are_and_missing_ones_left_out(repo):
    wanted = ["params.yaml", "metrics", "dvc.lock"]
    assert read_files(repo, "HEAD", wanted) == {
        "params.yaml": b"lr: 2\n",
        "metrics/a.json": b"{}",
        "metrics/b.bin": b"\n\x00\nblob 3\n",
    }
    assert read_files(repo, "HEAD~1", wanted) == {"params.yaml": b"lr: 1\n"}
    assert read_files(repo, "HEAD", ["nothing"]) == {}


def test_a_project_may_be_a_folder_of_its_repository(repo):
    commit(repo, {"project/params.yaml": b"lr: 3\n"})
    assert read_files(repo / "project", "HEAD", ["params.yaml"]) == {"params.yaml": b"lr: 3\n"}


def test_no_repository_and_no_commit_are_said(tmp_path):
    with pytest.raises(InputError, match="isn't in a git repository; run the command from the project's root"):
        head_commit(tmp_path)
    git(tmp_path, "init", "--quiet")
    with pytest.raises(InputError, match="rev-parse"):
        head_commit(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        head_commit(tmp_path / "nowhere")


def test_git_must_be_installed(repo, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="git isn't installed"):
        head_commit(repo)

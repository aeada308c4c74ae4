"""A copy of the project to run the real `dvc` in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import ROOT, shrunk_tree

README = (ROOT / "README.md").read_text()


class Project:
    """A shrunken copy of the project in a git repository of its own.

    Args:
        changes: of the shrunken params, by section.
    """

    def __init__(self, folder: Path, **changes: dict) -> None:
        self.folder = folder
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "GIT_"))}
        self.env |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "1",
            "GIT_CONFIG_GLOBAL": str(folder.parent / "gitconfig"),
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@example.com",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@example.com",
        }
        self.env.pop("PYTHONPATH", None)
        tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
        for name in tracked:
            if not name.startswith(("tests/", "dvc.lock", "metrics/")) and (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        (folder / "params.yaml").write_text(yaml.safe_dump(shrunk_tree(**changes), sort_keys=False))
        self.run("git init --quiet --initial-branch main")
        self.commit("the project, shrunken")

    def run(self, command: str, ok: bool = True) -> str:
        """Run a command line, which must succeed (or, with ok=False, must not); what it printed."""
        done = subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert (done.returncode == 0) == ok, f"{command}: exit {done.returncode}\n{done.stdout}"
        return done.stdout

    def readme(self, command: str) -> str:
        """Run a command that stands word by word in the README."""
        assert command in README, f"README.md doesn't show: {command}"
        return self.run(command)

    def commit(self, message: str) -> None:
        self.run("git add --all")
        self.run(f"git commit --quiet --message '{message}'")

    def json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())

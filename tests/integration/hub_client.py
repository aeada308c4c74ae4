"""Runs sdtrain against a hub of the test's choice.

huggingface_hub reads `HF_ENDPOINT` when it is imported, so the code runs in a process of its own;
that process takes many calls, one after another, because its imports take seconds.
"""

import json
import os
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Answer:
    """What a call led to: `error` is the message of an `InputError`; `printed` is its standard output."""

    error: str | None
    printed: str


class HubClient:
    """A process that calls `resolve_base`, `resolve_features` and `build_dataset` with the shipped params and some
    changes, and plans."""

    def __init__(self, endpoint: str, home: Path, **environment: str) -> None:
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        outside = {key: value for key, value in outside.items() if not key.lower().endswith("_proxy")}
        hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        home.mkdir(parents=True, exist_ok=True)
        self._errors = home / "stderr.txt"
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**outside, **hub, **quiet, "PYTHONPATH": str(ROOT / "src"), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors.open("w"),
            text=True,
        )

    def __enter__(self) -> "HubClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def resolve_base(self, out: Path, **changes: object) -> Answer:
        """Call `resolve_base` with the `base` section so changed, into `out`."""
        return self._call({"section": "base", "changes": changes, "out": str(out)})

    def resolve_features(self, out: Path, **changes: object) -> Answer:
        """Call `resolve_features` with the `evaluate` section so changed, into `out`."""
        return self._call({"section": "evaluate", "changes": changes, "out": str(out)})

    def build_dataset(self, out: Path, **changes: object) -> Answer:
        """Call `build_dataset` with the `dataset` section so changed, into `out` and `out.json`."""
        return self._call({"section": "dataset", "changes": changes, "out": str(out)})

    def plan(self, folder: Path) -> Answer:
        """Run `sdtrain plan` in a project's folder."""
        return self._call({"section": "plan", "folder": str(folder)})

    def _call(self, call: dict) -> Answer:
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process died:\n{self._errors.read_text()}"
        answer = json.loads(line)
        assert answer["crash"] is None, f"not an InputError:\n{answer['crash']}"
        return Answer(answer["error"], answer["printed"])


def _plan(folder: str) -> None:
    from sdtrain.cli import main
    from sdtrain.ground.errors import InputError

    os.chdir(folder)
    try:
        main(["plan"])
    except SystemExit as refusal:
        raise InputError(str(refusal)) from None


def _run(call: dict) -> None:
    if call["section"] == "plan":
        _plan(call["folder"])
        return
    from sdtrain.base import resolve_base
    from sdtrain.dataset import build_dataset
    from sdtrain.features import resolve_features
    from sdtrain.params.load import load_params
    from sdtrain.params.schema import BaseParams, DatasetParams, EvaluateParams

    tree = load_params(ROOT / "params.yaml").model_dump()
    tree[call["section"]].update(call["changes"])
    out = Path(call["out"])
    # The section alone, without the method that asks for it.
    if call["section"] == "base":
        resolve_base(BaseParams.model_validate(tree["base"]), tree["seed"], out=out)
    elif call["section"] == "evaluate":
        resolve_features(EvaluateParams.model_validate(tree["evaluate"]), out=out)
    else:
        params = DatasetParams.model_validate(tree["dataset"])
        build_dataset(params, tree["seed"], out=out, metrics=out.with_suffix(".json"))


def _serve() -> None:
    from sdtrain.ground import hub
    from sdtrain.ground.errors import InputError

    hub.FIRST_WAIT_S = 0.01
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else writes to standard output
    for line in sys.stdin:
        error, crash, printed = None, None, StringIO()
        try:
            with redirect_stdout(printed):
                _run(json.loads(line))
        except InputError as fault:
            error = str(fault)
        except Exception:
            crash = traceback.format_exc()
        answers.write(json.dumps({"error": error, "crash": crash, "printed": printed.getvalue()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()

"""The project holds its own shape: layers, and dvc.yaml against what the code imports, reads and names."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from sdtrain.ground.imports import SOURCE, import_closure
from sdtrain.params.load import load_params
from sdtrain.params.schema import ConditionName, EvaluateParams, Params

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = list(PIPELINE["stages"])
NEUTRAL = {("dataset", "dataset"): {"num_workers"}, ("train", "precompute"): {"batch_size"}}
NEUTRAL["features", "evaluate"] = {name for name in EvaluateParams.model_fields if not name.startswith("features")}
"""Fields by (stage, section) that change no byte of any of its outs, and so are no params of the stage."""
NOT_OUTS = {"PARAMS", "RUNS", "STATES"}
EXACT = ("base", "features", "dataset", "precompute")
"""Stages whose needless rerun costs hours: their deps are files. The others depend on folders, too: a rerun of `train`
is cheap while its saved state is there."""
NO_DEPS = (
    "sdtrain", "sdtrain.ground", "sdtrain.data", "sdtrain.models", "sdtrain.evaluation", "sdtrain.training",
    "sdtrain.ground.errors", "sdtrain.ground.gpus", "sdtrain.params*", "stages", "stages.paths", "stages.launch",
    "stages.lease",
)  # fmt: skip
"""Modules that no stage depends on: params (DVC watches their values), the exceptions, the paths (they are the outs'),
which GPUs a process gets, how processes are started, and packages' docstrings."""


def closure_of(stage: str) -> set[str]:
    """The files that a stage's script imports, directly or not, and the script itself."""
    script = ROOT / "stages" / f"{stage}.py"
    found = import_closure([script], {"sdtrain": SOURCE, "stages": ROOT}, skip=NO_DEPS)
    return {path.relative_to(ROOT).as_posix() for path in (script, *found.values())}


def code_deps(stage: str) -> set[str]:
    return {dep for dep in PIPELINE["stages"][stage]["deps"] if dep.startswith(("src/", "stages/"))}


def attributes_of(stage: str, name: str) -> set[str]:
    """What a stage's script reads of the variable `name`."""
    tree = ast.parse((ROOT / "stages" / f"{stage}.py").read_text())
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }


def sections_of(stage: str) -> set[str]:
    """The sections of the params that a stage reads: where its script hands on all of them, anywhere in its code."""
    tree = ast.parse((ROOT / "stages" / f"{stage}.py").read_text())
    whole = any(
        isinstance(argument, ast.Name) and argument.id == "params"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for argument in node.args
    )
    if not whole:
        return attributes_of(stage, "params")
    texts = [(ROOT / name).read_text() for name in closure_of(stage)]
    named = {name for text in texts for name in re.findall(r"\bparams\.([a-z_]+)", text)}
    return named & set(Params.model_fields)


def names_in(entries: list) -> set[str]:
    return {name for entry in entries for name in (entry if isinstance(entry, dict) else [entry])}


@pytest.mark.parametrize("stage", EXACT)
def test_code_deps_are_exactly_what_the_stage_imports(stage):
    assert code_deps(stage) == closure_of(stage)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in EXACT])
def test_code_deps_cover_what_the_stage_imports_and_name_nothing_else(stage):
    deps, closure = code_deps(stage), closure_of(stage)
    covered = {dep: {name for name in closure if name == dep or name.startswith(f"{dep}/")} for dep in deps}
    assert set().union(*covered.values()) == closure
    assert [dep for dep, names in covered.items() if not names] == []


def test_what_no_stage_depends_on_computes_nothing():
    """Packages hold a docstring; the schema of params holds fields. A method's are watched by value, as all params."""
    for name in NO_DEPS[:6]:
        path = SOURCE.joinpath(*name.split("."), "__init__.py")
        body = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Expr)]
        assert all(isinstance(node, ast.Assign) for node in body), path
    schema = ast.parse((SOURCE / "sdtrain" / "params" / "schema.py").read_text())
    assert not [node.name for node in ast.walk(schema) if isinstance(node, ast.FunctionDef | ast.Lambda)]


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_exactly_what_the_stage_reads(stage):
    expected = set()
    for section in sections_of(stage):
        fields = Params.model_fields[section].annotation
        neutral = NEUTRAL.get((stage, section), set())
        expected |= {f"{section}.{field}" for field in set(fields.model_fields) - neutral} if neutral else {section}
    assert set(PIPELINE["stages"][stage]["params"]) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_paths_are_exactly_the_data_deps_and_outs(stage):
    from stages import paths

    spec = PIPELINE["stages"][stage]
    outs = {name for key in ("outs", "metrics", "plots") for name in names_in(spec.get(key, []))}
    data = {dep for dep in spec["deps"] if dep not in code_deps(stage) and "${" not in dep}
    named = {getattr(paths, name).as_posix() for name in attributes_of(stage, "paths") - NOT_OUTS}
    assert named == outs | data
    keywords = {
        keyword.arg
        for node in ast.walk(ast.parse((ROOT / "stages" / f"{stage}.py").read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if isinstance(keyword.value, ast.Attribute) and getattr(paths, keyword.value.attr, Path()).as_posix() in outs
    }
    inputs = {"base", "dataset", "latents", "model"}
    inputs |= {"checkpoints"} if stage != "train" else set()
    assert not keywords & inputs, "an out is handed to the library as an input"


def test_sources_that_params_name_are_deps():
    assert "${base.path}" in PIPELINE["stages"]["base"]["deps"]
    assert "${dataset.path}" in PIPELINE["stages"]["dataset"]["deps"]
    assert "${train.branch_from}" in PIPELINE["stages"]["train"]["deps"]
    params = load_params(ROOT / "params.yaml")
    assert (ROOT / params.base.path).is_dir()
    assert (ROOT / params.dataset.path).is_dir()
    assert (ROOT / params.train.branch_from).is_dir()


def test_every_stage_runs_its_own_script_and_nothing_else():
    assert {stage: spec["cmd"] for stage, spec in PIPELINE["stages"].items()} == {
        stage: f"python -m stages.{stage}" for stage in STAGES
    }
    helpers = {"__init__", "launch", "lease", "paths", "torchrun"}
    scripts = {path.stem for path in (ROOT / "stages").glob("*.py")} - helpers
    assert scripts == set(STAGES)


def test_stage_scripts_fit_on_a_screen():
    assert {
        path.name: n for path in (ROOT / "stages").glob("*.py") if (n := len(path.read_text().splitlines())) > 40
    } == {}


def test_layers():
    """The contracts stand in pyproject.toml."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_only_params_reads_the_params_file():
    readers = {path.name for path in (ROOT / "src").rglob("*.py") if "import yaml" in path.read_text()}
    assert readers == {"load.py"}


def test_light_stages_import_no_torch():
    """`base` and `dataset` start in a second: what needs torch is imported where it is used."""
    code = (
        "import sys, stages.base, stages.dataset, stages.features; "
        "sys.exit(bool({'torch', 'diffusers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_plot_names_columns_that_its_table_has():
    """And says what its axes show, unless its template leaves them bare."""
    plots = [
        entry for spec in PIPELINE["stages"].values() for entry in spec.get("plots", []) if isinstance(entry, dict)
    ]
    plots = [(name, spec | {"y": {name: spec["y"]}}) for entry in plots for name, spec in entry.items()]
    curves = [entry for entry in PIPELINE["plots"] if isinstance(entry, dict)]  # the others are images
    plots += [(name, spec) for entry in curves for name, spec in entry.items()]
    for name, spec in plots:
        assert spec.get("template") == "bars" or {"x_label", "y_label"} < set(spec), name
        for table, columns in spec["y"].items():
            header = (ROOT / table).read_text().splitlines()[0].split(",")
            named = [spec["x"], *([columns] if isinstance(columns, str) else columns)]
            assert [column for column in named if column not in header] == [], f"{name}: {table}"


def test_the_plot_of_condition_use_knows_every_condition():
    template = json.loads((ROOT / ".dvc" / "plots" / "condition_use.json").read_text())
    conditions = ("text", *get_args(ConditionName))
    assert template["transform"][0]["fold"] == [f"gap_{condition}" for condition in conditions]

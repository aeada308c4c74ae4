"""The project holds its own shape: layers, and dvc.yaml against what the code imports, reads and names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sdtrain.params import Params, load_params

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = list(PIPELINE["stages"])
NEUTRAL = {("dataset", "dataset"): {"num_workers"}, ("train", "precompute"): {"batch_size"}}
"""Fields by (stage, section) that change no byte of any of its outs, and so are no params of the stage."""
NOT_OUTS = {"PARAMS", "RUNS", "RESUME"}


def source_of(module: str) -> Path | None:
    parts = Path(*module.split("."))
    for root in (ROOT, ROOT / "src"):
        for path in (root / parts.with_suffix(".py"), root / parts / "__init__.py"):
            if path.exists() and parts.parts[0] in ("stages", "sdtrain"):
                return path
    return None


def imported_modules(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it, and the packages those lie in."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.rsplit(".", cut)[0] for name in names for cut in range(name.count(".") + 1)}


def import_closure(path: Path, found: set[Path]) -> set[Path]:
    found.add(path)
    for module in imported_modules(path):
        if (source := source_of(module)) and source not in found:
            import_closure(source, found)
    return found


def attributes_of(stage: str, name: str) -> set[str]:
    """What a stage's script reads of the variable `name`."""
    tree = ast.parse((ROOT / "stages" / f"{stage}.py").read_text())
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }


def names_in(entries: list) -> set[str]:
    return {name for entry in entries for name in (entry if isinstance(entry, dict) else [entry])}


@pytest.mark.parametrize("stage", STAGES)
def test_code_deps_are_exactly_what_the_stage_imports(stage):
    closure = import_closure(ROOT / "stages" / f"{stage}.py", set())
    in_closure = {path.relative_to(ROOT).as_posix() for path in closure}
    assert {dep for dep in PIPELINE["stages"][stage]["deps"] if dep.endswith(".py")} == in_closure


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_exactly_what_the_stage_reads(stage):
    expected = set()
    for section in attributes_of(stage, "params") - {"model_dump"}:  # `train` records the whole tree
        fields = Params.model_fields[section].annotation
        neutral = NEUTRAL.get((stage, section), set())
        expected |= {f"{section}.{field}" for field in set(fields.model_fields) - neutral} if neutral else {section}
    assert set(PIPELINE["stages"][stage]["params"]) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_paths_are_exactly_the_data_deps_and_outs(stage):
    from stages import paths

    spec = PIPELINE["stages"][stage]
    outs = {name for key in ("outs", "metrics", "plots") for name in names_in(spec.get(key, []))}
    data = {dep for dep in spec["deps"] if not dep.endswith(".py") and "${" not in dep}
    named = {getattr(paths, name).as_posix() for name in attributes_of(stage, "paths") - NOT_OUTS}
    assert named == outs | data
    keywords = {
        keyword.arg
        for node in ast.walk(ast.parse((ROOT / "stages" / f"{stage}.py").read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if isinstance(keyword.value, ast.Attribute) and getattr(paths, keyword.value.attr, Path()).as_posix() in outs
    }
    inputs = {"base", "dataset", "latents", "checkpoints", "model"}
    assert not keywords & inputs, "an out is handed to the library as an input"


def test_sources_that_params_name_are_deps():
    assert "${base.path}" in PIPELINE["stages"]["base"]["deps"]
    assert "${dataset.path}" in PIPELINE["stages"]["dataset"]["deps"]
    params = load_params(ROOT / "params.yaml")
    assert (ROOT / params.base.path).is_dir()
    assert (ROOT / params.dataset.path).is_dir()


def test_every_stage_runs_its_own_script_and_nothing_else():
    assert {stage: spec["cmd"] for stage, spec in PIPELINE["stages"].items()} == {
        stage: f"python -m stages.{stage}" for stage in STAGES
    }
    scripts = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__", "launch", "paths"}
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
    assert readers == {"params.py"}


def test_light_stages_import_no_torch():
    """`base` and `dataset` start in a second: what needs torch is imported where it is used."""
    code = (
        "import sys, stages.base, stages.dataset; sys.exit(bool({'torch', 'diffusers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

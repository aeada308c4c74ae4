"""`dvc plots` with the real `dvc` binary: what is drawn, of which revisions, and that the page needs no network.

A script stands in for `train` and `evaluate`, the stages with tables; what dvc.yaml says of these is the shipped one's.
"""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.e2e.project import Project

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
TABLES = {
    name: spec
    for stage in PIPELINE["stages"].values()
    for entry in stage.get("plots", [])
    if isinstance(entry, dict)
    for name, spec in entry.items()
}
"""What dvc.yaml says of each table."""
TOP_LEVEL = [entry for entry in PIPELINE["plots"] if isinstance(entry, dict)]
"""Without images, which nothing here draws."""
CURVES = {name for entry in TOP_LEVEL for name in entry}
STAND_IN = '''\
"""Writes the tables of `train` or `evaluate`: an even seed's of scenes with prompts, an odd one's of relit scenes."""

import sys
from pathlib import Path

import yaml

seed = yaml.safe_load(Path("params.yaml").read_text())["seed"]
Path("metrics").mkdir(exist_ok=True)
relit = seed % 2


def write(name, header, *rows):
    Path("metrics", name).write_text("\\n".join([header, *rows]) + "\\n")


if sys.argv[1] == "train":
    print("stands in for train")
    Path("data/checkpoints").mkdir(parents=True, exist_ok=True)
    Path("data/checkpoints/weights").write_text(str(seed))
    Path("plots/validation").mkdir(parents=True, exist_ok=True)
    Path("metrics/train.json").write_text("{}")
    write(
        "train.csv",
        "step,loss,loss_smoothed,lr,grad_norm,grad_norm_clip,param_norm_clip,loss_q1,loss_q2,loss_q3,loss_q4",
        *(f"{step},0.2,0.{step}{seed},1e-4,2,1,200,0.4,0.3,0.2," for step in (1, 2)),
    )
    write("train_speed.csv", "step,samples_per_sec", "1,3.5", "2,4.5")
    write("validation.csv", "step,loss_raw,loss_ema,gap_text,gap_hint", "0,0.2,0.2,,0", f"2,0.1,0.1,,0.{seed + 1}")
else:
    write("loss_by_timestep.csv", "timestep,base,trained", "100,0.4,0.3", f"900,0.1,0.0{seed}")
    shares = ("new,color,base,0.0,0.0,0.04,96", f"new,color,trained,0.9{seed},0.88,0.98,96")
    write("prompt_accuracy.csv", "prompts,attribute,model,accuracy,ci_low,ci_high,num", *(() if relit else shares))
    errors = ("light_direction_error_deg,base,107,100,114,160", "light_direction_error_deg,vae,3.2,3,4,160")
    write("relighting.csv", "metric,model,value,ci_low,ci_high,num", *(errors if relit else ()))
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """Two commits, of the seeds 0 and 1, tagged `prompted` and `relit`; the second was the experiment `odd`."""
    folder = tmp_path_factory.mktemp("plots") / "project"
    folder.mkdir()
    project = Project(folder)
    pipeline = {"stages": {}, "plots": TOP_LEVEL}
    for name, kinds in {"train": ("outs", "metrics", "plots"), "evaluate": ("plots",)}.items():
        shipped = {kind: PIPELINE["stages"][name][kind] for kind in kinds}
        pipeline["stages"][name] = {"cmd": f"python stand_in.py {name}", "params": ["seed"], **shipped}
    (folder / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    (folder / "stand_in.py").write_text(STAND_IN)
    project.run("dvc repro")
    project.commit("seed 0")
    project.run("git tag prompted")
    project.run("dvc exp run --set-param seed=1 --name odd")
    project.commit("seed 1")
    project.run("git tag relit")
    return project


def drawn(project: Project, command: str) -> dict[str, dict]:
    """By title, the specs that `dvc plots` writes, of those that have data; there is no error."""
    shown = json.loads(project.run(f"{command} --json"))
    assert "errors" not in shown
    return {plot["content"]["title"]["text"]: plot["content"] for plots in shown["data"].values() for plot in plots}


def rows(spec: dict) -> list[dict]:
    return spec["data"]["values"]


def test_what_dvc_yaml_names_is_drawn_and_nothing_else_with_words_at_the_axes(project):
    plots = drawn(project, "dvc plots show")
    titles = {name: spec["title"] for name, spec in TABLES.items()}
    empty = titles["metrics/prompt_accuracy.csv"]  # of seed 1
    assert set(plots) == CURVES | set(titles.values()) - {empty}
    axes = set(re.findall(r'"title": "([^"]+)"', json.dumps([{**spec, "data": None} for spec in plots.values()])))
    specs = [*TABLES.values(), *(spec for entry in TOP_LEVEL for spec in entry.values())]
    assert all("y_label" in spec for spec in specs)
    shown = [spec for spec in specs if spec.get("title") != empty]
    assert axes >= {spec[label] for spec in shown for label in ("x_label", "y_label") if label in spec}
    assert [title for title in axes if "_" in title] == []


def test_bars_have_both_models_with_their_intervals(project):
    spec = drawn(project, "dvc plots diff prompted")[TABLES["metrics/prompt_accuracy.csv"]["title"]]
    assert [(row["model"], row["accuracy"], row["ci_low"], row["ci_high"]) for row in rows(spec)] == [
        ("base", "0.0", "0.0", "0.04"),
        ("trained", "0.90", "0.88", "0.98"),
    ]
    bars, intervals, _ = spec["spec"]["layer"]
    assert (bars["mark"], bars["encoding"]["x"]["field"]) == ("bar", "accuracy")
    assert bars["encoding"]["x"]["title"] == "share of images"
    assert (intervals["encoding"]["x"]["field"], intervals["encoding"]["x2"]["field"]) == ("ci_low", "ci_high")


def test_revisions_are_told_apart(project):
    plots = drawn(project, "dvc plots diff prompted relit")
    title = {name: spec["title"] for name, spec in TABLES.items()}
    only = {title["metrics/prompt_accuracy.csv"]: {"prompted"}, title["metrics/relighting.csv"]: {"relit"}}
    for name, spec in plots.items():
        revisions = only.get(name, {"prompted", "relit"})
        assert {row["rev"] for row in rows(spec)} == revisions, name
        assert f'"domain": {json.dumps(sorted(revisions))}' in json.dumps(spec), f"{name}: no colours by revision"
    assert set(plots) == CURVES | set(title.values())


def test_tables_stay_in_git_and_out_of_the_cache(project):
    experiment = project.run("git for-each-ref --format '%(refname)' 'refs/exps/*/*/odd'").strip()
    for revision in ("prompted", "relit", experiment):
        assert set(project.run(f"git ls-tree -r --name-only {revision} metrics").split()) > set(TABLES)
    assert project.run(f"git show {experiment}:metrics/loss_by_timestep.csv").endswith("900,0.1,0.01\n")
    ignored = {name for path in project.folder.rglob(".gitignore") for name in path.read_text().split()}
    assert not [name for name in TABLES if f"/{Path(name).name}" in ignored]


def test_the_page_loads_nothing(project):
    project.run("dvc plots diff prompted relit")
    page = (project.folder / "dvc_plots" / "index.html").read_text()
    loaded: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            loaded.extend(value for name, value in attrs if name in ("src", "href"))

    Parser().feed(page)
    assert loaded == []
    assert "vega-lite" in page[: page.index("<html")], "the licences go with the page"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in: apt-get install chromium")
@pytest.mark.parametrize(("command", "num_empty"), [("show", 1), ("diff prompted relit", 0)])
def test_a_browser_without_a_network_draws_every_plot(project, tmp_path, command, num_empty):
    page = project.run(f"dvc plots {command}").split()[-1]
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
            "--proxy-server=127.0.0.1:9", "--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom", page,
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # DVC's own template for curves warns of the layer that it shows under the pointer.
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "Infinite extent" not in line]
    assert console == []
    assert len(re.findall("<canvas", done.stdout)) == len(CURVES) + len(TABLES) - num_empty


def test_an_earlier_result_is_taken_from_the_run_cache(project):
    """Which DVC refuses to a stage with outs that are neither cached, nor metrics, nor plots."""
    output = project.run("dvc exp run --set-param seed=0")
    assert "Stage 'train' is cached - skipping run" in output
    assert "stands in for train" not in output

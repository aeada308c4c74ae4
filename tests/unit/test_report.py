"""`sdtrain report`: what the page holds, of made-up runs; test_report_page.py opens it in a browser."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtrain import cli
from sdtrain.ground.errors import InputError
from sdtrain.tools.compare import compare
from sdtrain.tools.compare.faults import faults_of
from sdtrain.tools.compare.runs import read_experiments, read_run
from sdtrain.tools.compare.text import as_json
from sdtrain.tools.report import recorded as recorded_files
from sdtrain.tools.report import report
from sdtrain.tools.report.charts import Chart, Line, charts_of
from sdtrain.tools.report.fit import Shown, fit
from sdtrain.tools.report.matrix import Matrix, Row, sample_matrix
from sdtrain.tools.report.metrics import metrics_table
from sdtrain.tools.report.numbers import differences, differences_table, health_of
from sdtrain.tools.report.others import Prompt, validation_images
from sdtrain.tools.report.recorded import Folder, Recorded, read_recorded
from sdtrain.tools.report.thumbnails import LEVELS, Gallery
from tests.unit.report_runs import (
    MARKUP,
    PROMPTS,
    changed,
    make_project,
    noise,
    outs_of,
    png,
    run_files,
    samples,
    store,
)
from tests.unit.test_compare import LOSS, PARAMS, add_experiment, git


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A project of HEAD and three experiments, to be left as it is."""
    folder = tmp_path_factory.mktemp("report") / "project"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_project(folder)
    return folder


@pytest.fixture
def project(made, tmp_path, monkeypatch) -> Path:
    """A copy, which is the current folder. DVC isn't asked again where its cache is."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr(recorded_files, "_cache_folder", lambda root: root / ".dvc" / "cache")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def page(made) -> str:
    return page_of(made)


def page_of(root: Path, *revs: str, max_mb: int = 10) -> str:
    runs, notes = ([read_run(root, rev) for rev in revs], []) if revs else read_experiments(root)
    return report(root, runs, notes, [LOSS], max_mb)


def recorded(root: Path, *revs: str) -> list[Recorded]:
    return [read_recorded(root, read_run(root, rev)) for rev in revs]


class Elements(HTMLParser):
    """A page's elements with their attributes, and its text outside of styles and scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._is_code = "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._is_code = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._is_code = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._is_code else data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page, re.S)[1])


# The page.


def test_markup_is_shown_as_text_wherever_it_comes_from(page):
    """In the made-up runs it is prompt, item, training image, caption and param."""
    elements = Elements(page)
    assert elements.text.count(MARKUP) >= 6
    assert elements.named("b") == []
    assert [script.get("type") for script in elements.named("script")] == ["application/json", None, None]
    assert "{{ 7 * 7 }}" in elements.text


def test_the_numbers_are_in_the_page_as_json(page, made):
    raw = re.search(r'id="report-data">(.*?)</script>', page, re.S)[1]
    assert "<" not in raw
    data = data_of(page)
    assert data["comparisons"] == json.loads(json.dumps([as_json(compare(read_experiments(made)[0], LOSS))]))
    assert [run["name"] for run in data["runs"]] == ["HEAD", "bad", "fast-0", "fast-1"]
    assert data["runs"][1]["params"]["train.note.said"] == MARKUP
    assert data["runs"][2]["metrics"][LOSS] == 0.6
    assert {row["text"] for row in data["samples"]} == set(PROMPTS)
    assert data["held_out"][0] == {
        "run": "HEAD", "item": MARKUP, "text": MARKUP, "image": "worst/00.png", "loss_base": 0.4, "loss_trained": 0.3,
    }  # fmt: skip
    assert data["neighbors"][0]["pairs"][0]["ratio"] == 0.8
    (loss,) = (chart["spec"]["data"]["values"] for chart in data["charts"] if chart["id"] == "held-out-loss")
    assert {"line": "bad", "group": "as bad", "x": 20, "y": 0.3} in loss


def test_the_page_is_the_same_wherever_and_whenever_it_is_written(page, project):
    assert page_of(project) == page


def test_only_the_two_scripts_may_run_and_nothing_is_loaded(page):
    elements = Elements(page)
    policy = next(meta["content"] for meta in elements.named("meta") if "http-equiv" in meta)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'"
    )
    addresses = [value for _, found in elements.found for name, value in found.items() if name in ("src", "href")]
    assert [address for address in addresses if not address.startswith(("#", "data:image/webp;base64,"))] == []
    assert "University of Washington" in page[: page.index("<html")], "Vega's licence goes with it"


def test_every_image_is_there_once_and_every_reference_has_one(page):
    elements = Elements(page)
    images = elements.named("image")
    assert len({image["id"] for image in images}) == len({image["href"] for image in images}) == len(images)
    used = {use["href"] for use in elements.named("use") if "href" in use}
    assert used == {f"#{image['id']}" for image in images}


def test_sections_come_in_their_order(page):
    assert re.findall(r'<section id="(.*?)">\n<h2>', page) == [
        "verdicts", "differences", "images", "loss", "held-out", "neighbors", "metrics", "health", "again",
    ]  # fmt: skip


def test_runs_that_cannot_be_read_are_named(project):
    add_experiment("broken", {"metrics/evaluate.json": None})
    assert "left out: broken has no metrics/evaluate.json; run dvc repro" in Elements(page_of(project)).text


def test_one_run_gets_no_verdict(made):
    text = Elements(page_of(made, "fast-0")).text
    assert "One run: there is nothing to compare it with" in text
    assert "What differs" not in text
    assert "can't tell" not in text


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("sub", "error: --output sub: is a folder; name a file in it"),
        ("", "error: --output .: is a folder; name a file in it"),
        ("params.yaml/report.html", "error: --output params.yaml/report.html: can't be written: "),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(project, output, message):
    Path("sub").mkdir()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", "fast-0", "--output", output])
    assert message in str(stopped.value)


def test_the_command_writes_the_file(project, capsys):
    cli.main(["report", "fast-0", "HEAD", "--output", "sub/two.html", "--metric", LOSS])
    page = Path("sub/two.html").read_text(encoding="utf-8")
    assert page == page_of(project, "fast-0", "HEAD")
    assert capsys.readouterr().out.startswith("sub/two.html: 2 runs, ")
    commit = git("rev-parse", "HEAD")
    for command in ("dvc exp apply fast-0 && dvc repro", f"git checkout {commit} && dvc repro"):
        assert command in Elements(page).text
    assert f"sdtrain report fast-0 {commit[:10]} --metric {LOSS}" in Elements(page).text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fast"], "fast: no experiment, branch, tag or commit has this name; nearest is fast-"),
        (["--metric", "num_held_out"], "metric = 'num_held_out': must be one that tells which run is better"),
    ],
)
def test_what_is_not_there_is_refused_and_no_file_is_written(project, arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["report", *arguments])
    assert not Path("report.html").exists()


@pytest.mark.parametrize("content", [None, "<html></html>"])
def test_without_vega_it_says_what_to_do(project, content):
    path = project / ".dvc" / "plots" / "offline.html"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=r"^\.dvc/plots/offline\.html: .*`git checkout \.dvc/plots/offline\.html`$"):
        page_of(project)


# Images.


def test_rows_that_changed_most_come_first(made):
    """Of bases of shade 0 the trained images are 20, 40 and 60 away in red and blue, on the square in blue alone."""
    gallery = Gallery()
    matrix, notes = sample_matrix(recorded(made, "HEAD"), gallery)
    assert notes == []
    assert [row.text for row in matrix.rows] == [text for text in reversed(PROMPTS) for _ in range(2)]
    square = 9 * 9 / 32**2
    for place, row in enumerate(matrix.rows):
        shade = 20 * (3 - place // 2)
        assert row.change == pytest.approx(shade / 255 / 3 * (2 * (1 - square) + square), rel=1e-6)


def test_the_base_is_one_column_where_it_is_the_same_and_checkpoints_have_their_own(made):
    matrix, _ = sample_matrix(recorded(made, "HEAD", "fast-0"), Gallery())
    assert matrix.columns == ["base", "HEAD", "HEAD · last", "fast-0", "fast-0 · last"]
    assert matrix.scales == ["4", "7.5"]
    assert all(all(row.cells) for row in matrix.rows)


def test_bases_that_differ_stand_apart(project):
    other = outs_of(50)
    other["data/samples"]["images/01-base-guidance4-seed0.png"] = png(99)
    add_experiment("other", run_files(project, changed(lr=5e-3), 0.9, other))
    matrix, _ = sample_matrix(recorded(project, "HEAD", "other"), Gallery())
    assert matrix.columns[:2] == ["base of HEAD", "base of other"]


def test_prompts_that_only_one_run_has_leave_the_other_cells_empty(project):
    other = outs_of(50)
    other["data/samples"]["samples.json"] = other["data/samples"]["samples.json"].replace(b"a large star", b"a dot")
    add_experiment("other", run_files(project, changed(lr=5e-3), 0.9, other))
    matrix, _ = sample_matrix(recorded(project, "HEAD", "other"), Gallery())
    (star,) = [row for row in matrix.rows if row.text == "a large star" and row.scale == "4"]
    (dot,) = [row for row in matrix.rows if row.text == "a dot" and row.scale == "4"]
    assert [cell is not None for cell in star.cells] == [True, True, True, False, False]
    assert [cell is not None for cell in dot.cells] == [True, False, False, True, True]
    assert "not drawn" in Elements(page_of(project, "HEAD", "other")).text


def test_images_that_are_not_in_the_cache_are_said_and_the_rest_is_shown(project):
    shutil.rmtree(project / ".dvc" / "cache")
    store(project, samples(20))  # HEAD's
    page = page_of(project, "HEAD", "fast-0")
    commit = git("rev-parse", "refs/exps/" + git("for-each-ref", "--format=%(refname)", "refs/exps/*/*/fast-0")[10:])
    text = re.sub(r"\s+", " ", Elements(page).text)
    assert (
        f"fast-0: data/samples isn't in DVC's cache; get it with git checkout {commit[:10]} and dvc fetch data/samples."
    ) in text
    assert "HEAD: plots/validation isn't in DVC's cache" in text
    assert str(project) not in page
    assert len(Elements(page).named("image")) == 7, "one of the base, two of each prompt; scales make no difference"


def test_a_single_missing_or_broken_image_is_said(project):
    other = outs_of(50)
    other["data/samples"]["images/00-last-guidance4-seed0.png"] = b"no image"
    add_experiment("other", run_files(project, changed(lr=5e-3), 0.9, other))
    # The same at both scales, so two are lost with it.
    lost = hashlib.md5(other["data/samples"]["images/01-last-guidance4-seed0.png"]).hexdigest()
    (project / ".dvc" / "cache" / "files" / "md5" / lost[:2] / lost[2:]).unlink()
    matrix, notes = sample_matrix(recorded(project, "other"), Gallery())
    assert sum(cell is None for row in matrix.rows for cell in row.cells) == 3
    ((name, reason),) = notes
    assert (name, reason.startswith("of data/samples 2 files aren't in DVC's cache")) == ("other", True)


def test_a_run_of_older_code_has_no_evaluation_images_and_says_so(project):
    outs = outs_of(50)
    del outs["data/evaluation"], outs["plots/validation"]
    add_experiment("old", run_files(project, changed(lr=5e-3), 0.9, outs))
    text = Elements(page_of(project, "old")).text
    assert "old: its dvc.lock has no data/evaluation, so its code wrote none." in text


def test_the_workspace_is_read_from_disk(project):
    for path, files in outs_of(70).items():
        for name, content in files.items():
            (project / path / name).parent.mkdir(parents=True, exist_ok=True)
            (project / path / name).write_bytes(content)
    shutil.rmtree(project / ".dvc" / "cache")
    matrix, notes = sample_matrix(recorded(project, "workspace"), Gallery())
    assert (matrix.columns, notes) == (["base", "trained", "last"], [])
    page = page_of(project, "workspace")
    assert "dvc exp apply" not in page
    assert "Nearest training images" in page
    shutil.rmtree(project / "data")
    assert "workspace: there is no data/samples on disk." in Elements(page_of(project, "workspace")).text


def test_a_run_without_validation_prompts_lacks_nothing(project):
    add_experiment("plain", run_files(project, changed(lr=5e-3), 0.9, outs_of(50) | {"plots/validation": {}}))
    prompts, notes = validation_images(recorded(project, "plain"), Gallery())
    assert (prompts, notes) == ([], [])
    assert "While they trained" not in page_of(project, "plain")


def test_images_by_step_are_matched_by_their_prompts_and_in_order(made):
    prompts, notes = validation_images(recorded(made, "HEAD", "fast-0"), Gallery())
    assert [prompt.text for prompt in prompts] == list(PROMPTS[:2])
    assert [[track.run for track in prompt.tracks] for prompt in prompts] == [["HEAD", "fast-0"]] * 2
    assert [list(track.steps) for prompt in prompts for track in prompt.tracks] == [[5, 10, 20]] * 4
    assert notes == []


@pytest.mark.parametrize(
    ("features", "message"), [(None, "evaluated without an image encoder"), ("tower", "compared with training images")]
)
def test_neighbours_that_were_not_looked_for_are_said(project, features, message):
    outs = outs_of(50)
    tree = {"features": features, "num_samples": 3, "threshold": None, "pairs": []}
    outs["data/evaluation"]["neighbors.json"] = json.dumps(tree).encode()
    add_experiment("far", run_files(project, changed(lr=5e-3), 0.9, outs))
    page = page_of(project, "far")
    assert message in Elements(page).text
    assert data_of(page)["neighbors"] == [{"run": "far"} | tree]


def test_broken_lists_are_said(project):
    outs = outs_of(50)
    outs["data/samples"]["samples.json"] = b"{"
    outs["data/evaluation"]["worst.json"] = b'[{"item": 3}]'
    add_experiment("odd", run_files(project, changed(lr=5e-3), 0.9, outs))
    text = Elements(page_of(project, "odd")).text
    assert "odd: data/samples/samples.json isn't valid JSON" in text
    assert "odd: data/evaluation/worst.json: 0.item: Input should be a valid string; run dvc repro evaluate." in text


# Size.


def gallery_of(tmp_path: Path, num: int, size: int = 256) -> tuple[Gallery, Shown]:
    """Rows of one image each, of noise, the first changed most."""
    gallery, rows = Gallery(), []
    for number in range(num):
        (tmp_path / f"{number}.png").write_bytes(noise(number, size))
        picture = gallery.add(tmp_path / f"{number}.png")
        rows.append(Row(f"row {number}", [], "4", {}, [picture], 1 - number / 100))
    return gallery, Shown(Matrix(["base"], rows, ["4"]), [], [])


def simple_page(images: dict[str, str], note: str) -> str:
    """Of whose megabyte a tenth is left for images."""
    return f"{note}\n{'text ' * 180_000}\n{' '.join(images.values())}"


@pytest.mark.parametrize(("num", "size"), [(1, 256), (4, 256), (40, 96)])
def test_the_page_stays_below_its_size_by_quality_then_size_then_rows(tmp_path, num, size):
    gallery, shown = gallery_of(tmp_path, num, size)
    page = fit(shown, gallery, 1, simple_page)
    assert len(page) <= 1_000_000
    kept = [row.text for row in shown.matrix.rows]
    assert kept == [f"row {number}" for number in range(len(kept))], "those that changed least go first"
    note = page.splitlines()[0]
    assert ("left out" in note) == (len(kept) < num)
    if num == 1:
        assert "quality 90, at most 256 px" in note
        assert "To stay within" not in note
    else:
        assert "To stay within 1 MB they are reduced from quality 90 and 256 px" in note
    if num == 40:
        assert (LEVELS[-1].quality, LEVELS[-1].side_px) == (50, 96)
        assert "quality 50, at most 96 px" in note
        assert f"{num - len(kept)} rows or images left out" in note


def test_of_what_is_left_out_the_longest_list_goes_first():
    rows = [Row(f"row {number}", [], "4", {}, [], None) for number in range(4)]
    shown = Shown(Matrix([], rows, ["4"]), [Prompt("a", []), Prompt("b", []), Prompt("c", [])], [])
    lengths = []
    while shown.leave_out():
        lengths.append((len(shown.matrix.rows), len(shown.prompts)))
    assert lengths == [(3, 3), (2, 3), (2, 2), (1, 2), (1, 1), (0, 1), (0, 0)]
    assert shown.num_left_out == 7


def test_a_page_without_room_for_its_text_is_refused(tmp_path):
    gallery, shown = gallery_of(tmp_path, 1)
    with pytest.raises(InputError, match=r"--max-mb 1: the page has 2\.0 MB without any image; allow more"):
        fit(shown, gallery, 1, lambda images, note: "x" * 2_000_000)


def test_a_whole_page_stays_below_its_size(project):
    outs = outs_of(50) | {"data/samples": samples(50, size=256, noisy=True)}
    add_experiment("large", run_files(project, changed(lr=5e-3), 0.9, outs))
    page = page_of(project, "large", max_mb=2)
    assert 1_000_000 < len(page.encode()) <= 2_000_000
    assert "To stay within 2 MB" in page
    assert "To stay within" not in page_of(project, "large", max_mb=10)


def test_equal_images_are_one_and_large_ones_are_made_small(tmp_path):
    gallery = Gallery()
    for name, content in {"a.png": noise(1, 300), "b.png": noise(1, 300), "c.png": noise(2, 300)}.items():
        (tmp_path / name).write_bytes(content)
    first, same, other = (gallery.add(tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    assert first == same != other
    assert (first.width, first.height) == (256, 256)
    data = base64.b64decode(gallery.encoded(first.id, LEVELS[-1]).removeprefix("data:image/webp;base64,"))
    (tmp_path / "a.webp").write_bytes(data)
    with Image.open(tmp_path / "a.webp") as image:
        assert (image.format, image.size) == ("WEBP", (96, 96))


def test_the_difference_of_images_is_of_their_pixels(tmp_path):
    gallery, pixels = Gallery(), []
    for shade in (0, 100):
        (tmp_path / f"{shade}.png").write_bytes(png(shade))
        with Image.open(tmp_path / f"{shade}.png") as image:
            pixels.append(np.asarray(image, dtype=np.float64))
    pictures = [gallery.add(tmp_path / f"{shade}.png") for shade in (0, 100)]
    assert gallery.difference(*pictures) == pytest.approx(np.abs(pixels[0] - pixels[1]).mean() / 255)
    (tmp_path / "other.png").write_bytes(png(0, size=40))
    assert gallery.difference(pictures[0], gallery.add(tmp_path / "other.png")) is None


# Numbers.


def test_a_wrong_run_is_named_with_what_is_wrong(made, page):
    runs = recorded(made, "HEAD", "fast-0", "bad")
    assert [len(faults_of(run.run)) for run in runs] == [0, 0, 2]
    dropped, unlearned = faults_of(runs[2].run)
    assert dropped.startswith("train.caption_dropout = 1.0: training hardly saw a caption")
    assert unlearned.startswith("training never lowered the held-out loss, 0.10000 before it and 0.20000 at best")
    text = Elements(page).text
    assert "Something is wrong with 1 of 4 runs" in text
    assert text.index(unlearned) < text.index("Only what isn't the same")
    assert "nothing is wrong" not in text
    assert "Something is wrong with the run" in Elements(page_of(made, "bad")).text
    assert "By what it recorded, nothing is wrong with any run." in Elements(page_of(made, "HEAD", "fast-0")).text


def test_only_what_differs_is_listed(made):
    found = {difference.name: difference for difference in differences(recorded(made, "HEAD", "fast-1"))}
    assert {name: difference.values for name, difference in found.items()} == {
        "train.lr": ["0.001", "0.002"], "train.seed": ["0", "1"],
    }  # fmt: skip
    assert differences(recorded(made, "HEAD")) == []


def test_code_data_and_params_that_move_no_metric_are_told_apart(project):
    files = run_files(project, PARAMS | {"sample": {"prompts": ["x"] * 60}}, 0.9, outs_of(50))
    files["dvc.lock"] = files["dvc.lock"].replace(b"c0de00", b"fffffffff").replace(b"d9", b"moved")
    add_experiment("other", files)
    found = {difference.name: difference for difference in differences(recorded(project, "HEAD", "other"))}
    assert {name: (entry.kind, entry.moves_metrics) for name, entry in found.items()} == {
        "sample.prompts": ("param", False), "data/set": ("data", True), "src/sdtrain/training": ("code", True),
    }  # fmt: skip
    assert found["src/sdtrain/training"].values == ["c0de00", "fffffff"]
    absent, long = found["sample.prompts"].values
    assert (absent, long[-1], len(long)) == ("–", "…", 81)


def test_the_table_of_differences_has_more_rows_than_columns(made):
    wide = differences_table(differences(recorded(made, "HEAD", "fast-1")), ["HEAD", "fast-1"])
    assert wide == [["", "train.lr", "train.seed"], ["HEAD", "0.001", "0"], ["fast-1", "0.002", "1"]]
    bad = differences_table(differences(recorded(made, "HEAD", "bad")), ["HEAD", "bad"])
    assert bad[0] == ["", "HEAD", "bad"]
    assert len(bad) > 3


def test_all_metrics_have_base_interval_number_and_floor(made):
    table = {metric.name: metric for metric in metrics_table(recorded(made, "HEAD", "bad"))}
    assert list(table) == [
        "held_out_loss", "num_held_out", "mmd_rbf_shapes", "clip_score_shapes", "num_set_images", "num_drawn_images",
    ]  # fmt: skip
    loss, mmd, score = table["held_out_loss"], table["mmd_rbf_shapes"], table["clip_score_shapes"]
    assert (loss.base, loss.better, [cell.value for cell in loss.cells]) == ("1.5", "lower", ["1", "2"])
    assert [cell.num for cell in loss.cells] == ["40", "40"]
    assert loss.cells[0].others == [("gain", "0.5 (0.1 to 0.9)")]
    assert (mmd.base, mmd.better, mmd.cells[0].value, mmd.cells[0].interval) == ("3.5", "lower", "2.5", "(2 to 3)")
    assert mmd.cells[0].others == [
        ("gain", "-1 (-1.5 to -0.5)"),
        ("floor", "0.25"),
        ("told from real images:", "yes"),
    ]
    assert (score.cells[0].value, score.cells[0].others) == ("30.5", [("real", "31.5")])
    assert (mmd.cells[0].num, score.cells[0].num) == ("80", "160")


def test_intervals_of_accuracies_come_from_their_table(project):
    files = run_files(project, changed(lr=5e-3), 0.9, outs_of(50))
    files["metrics/evaluate.json"] = json.dumps(
        {LOSS: 0.9, "held_out_loss_base": 1.4, "new_color_accuracy_base": 0.0, "new_color_accuracy_trained": 0.5}
    ).encode()
    header = files["metrics/prompt_accuracy.csv"].decode()
    rows = "new,color,base,0.0,0.0,0.04,96\nnew,color,trained,0.5,0.4,0.6,96\n"
    files["metrics/prompt_accuracy.csv"] = (header + rows).encode()
    add_experiment("other", files)
    table = {metric.name: metric for metric in metrics_table(recorded(project, "HEAD", "other"))}
    accuracy, loss = table["new_color_accuracy"], table["held_out_loss"]
    assert (accuracy.better, accuracy.cells[0].value) == ("higher", "")
    assert (accuracy.cells[1].value, accuracy.cells[1].interval, accuracy.cells[1].num) == ("0.5", "(0.4 to 0.6)", "96")
    assert accuracy.cells[1].others == [("base", "0 (0 to 0.04)")]
    assert (loss.base, [cell.others[0] for cell in loss.cells]) == ("", [("base", "1.5"), ("base", "1.4")])


def test_health_has_what_is_recorded(made):
    health = health_of(*recorded(made, "fast-0"))
    assert health["steps"] == "20"
    assert health["clipped gradients, of logged steps"] == "50 %"
    assert health["images per second, median"] == "8"
    assert health["peak memory"] == "0.5 GiB"
    assert health["libraries"] == "torch 2.13"
    assert health["device"] == "NVIDIA H200"
    assert health["trained with the code of commit"] == "c" * 10
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", health["committed"])
    assert "images dropped" not in health


def test_replicates_have_one_colour_and_equal_bases_one_line(made):
    charts = {chart.id: chart for chart in charts_of(recorded(made, "HEAD", "fast-0", "fast-1"), ["a", "b", "b"])}
    assert list(charts) == ["loss-by-timestep", "held-out-loss", "training-loss"]
    lines = charts["loss-by-timestep"].lines
    assert [(line.name, line.group, line.is_base) for line in lines] == [
        ("base", "base", True), ("HEAD", "a", False), ("fast-0", "b", False), ("fast-1", "b", False),
    ]  # fmt: skip
    spec = charts["loss-by-timestep"].spec()
    assert (spec["usermeta"], spec["encoding"]["color"]["scale"]["domain"]) == ({"bases": ["base"]}, ["base", "a", "b"])


def test_long_curves_are_thinned_and_keep_both_ends():
    chart = Chart("c", "t", "step", "loss", [Line("a", "a", False, [(float(x), x / 2) for x in range(5000)])])
    values = chart.spec()["data"]["values"]
    assert (len(values), values[0]["x"], values[-1]["x"]) == (300, 0, 4999)
    head, rows = chart.table()
    assert (head, len(rows), rows[0], rows[-1]) == (["step", "a"], 20, ["0", "0"], ["4999", "2500"])


def test_a_folder_without_a_file_says_why():
    with pytest.raises(InputError, match=r"^data/x has no a\.json$"):
        Folder("data/x", {}).json("a.json")
    with pytest.raises(InputError, match="^gone$"):
        Folder("data/x", {}, "gone").json("a.json")

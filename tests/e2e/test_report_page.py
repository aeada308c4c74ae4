"""The report in a browser: no error, its controls work, and without scripts everything is there."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from sdtrain.tools.compare.runs import read_experiments
from sdtrain.tools.report import report
from tests.unit.report_runs import make_project
from tests.unit.test_compare import LOSS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in: apt-get install chromium")
HELPERS = """
const all = (selector) => [...document.querySelectorAll(selector)];
const set = (id, value, event) => {
  const element = document.getElementById(id);
  element.value = value;
  element.dispatchEvent(new Event(event));
};
const rows = () => all(".row").filter((row) => !row.hidden).map((row) => row.querySelector("h3").textContent);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const answers = {};
"""
ANSWER = """
const place = document.createElement("pre");
place.id = "answers";
place.textContent = JSON.stringify(answers);
document.body.append(place);
"""


@dataclass
class Opened:
    """A page after its scripts ran."""

    dom: str
    console: list[str]

    @property
    def answers(self) -> dict:
        return json.loads(html.unescape(re.search(r'<pre id="answers">(.*?)</pre>', self.dom, re.S)[1]))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_project(folder)
        runs, notes = read_experiments(folder)
        (folder / "report.html").write_text(report(folder, runs, notes, [LOSS], 10), encoding="utf-8")
    return folder / "report.html"


def browse(page: Path, *options: str, width: int = 1400) -> Opened:
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'browser'}",
            "--proxy-server=127.0.0.1:9", "--enable-logging=stderr", "--virtual-time-budget=10000",
            f"--window-size={width},900", *options, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Opened(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def with_script(page: Path, script: str, allowed: bool = True) -> str:
    """The page's text with one more script at its end, whose hash is added to those that may run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text, end, rest = page.read_text(encoding="utf-8").rpartition("</body>")
    if allowed:
        text = text.replace("script-src 'sha256-", f"script-src 'sha256-{digest}' 'sha256-", 1)
    return f"{text}<script>{script}</script>{end}{rest}"


def drive(page: Path, tmp_path: Path, actions: str, allowed: bool = True) -> Opened:
    """Open a copy with a script that fills `answers`."""
    script = f"(async () => {{ {HELPERS}{actions}{ANSWER} }})();"
    (tmp_path / "driven.html").write_text(with_script(page, script, allowed), encoding="utf-8")
    return browse(tmp_path / "driven.html", "--dump-dom")


def test_it_opens_without_a_word_on_the_console_and_draws_every_chart(page):
    opened = browse(page, "--dump-dom")
    assert opened.console == []
    assert len(re.findall(r'<svg[^>]* class="marks"', opened.dom)) == 3
    assert opened.dom.count("vega-embed") >= 3


def test_the_filter_and_the_guidance_scale_choose_rows(page, tmp_path):
    opened = drive(
        page,
        tmp_path,
        """
        answers.first = rows().length;
        set("scale", "", "change");
        answers.all = rows().length;
        set("filter", "STAR  large", "input");
        answers.stars = rows();
        answers.said = document.getElementById("shown").textContent;
        set("filter", "<b>x</b>", "input");
        answers.markup = rows().length;
        set("filter", "nothing has this", "input");
        answers.none = rows().length;
        """,
    )
    assert opened.console == []
    assert opened.answers == {
        "first": 3 + 2, "all": 6 + 2, "stars": ["a large star"] * 3, "said": "3 of 8 rows", "markup": 2, "none": 0,
    }  # fmt: skip


def test_one_slider_moves_the_images_of_all_runs(page, tmp_path):
    opened = drive(
        page,
        tmp_path,
        """
        const shown = () => all(".track figure").filter((figure) => !figure.hidden);
        const state = () => [[...new Set(shown().map((figure) => figure.dataset.step))], shown().length];
        const slider = document.getElementById("step");
        answers.last = state();
        set("step", "0", "input");
        answers.first = state();
        answers.said = [slider.getAttribute("aria-valuetext"), document.getElementById("step-shown").textContent];
        slider.stepUp();
        slider.dispatchEvent(new Event("input"));
        answers.second = state();
        answers.max = slider.max;
        """,
    )
    assert opened.console == []
    num = 2 * 4  # prompts × runs
    assert opened.answers == {
        "last": [["20"], num], "first": [["5"], num], "said": ["step 5", "step 5"], "second": [["10"], num], "max": "2",
    }  # fmt: skip


def test_two_images_are_compared_by_wipe_and_blink(page, tmp_path):
    opened = drive(
        page,
        tmp_path,
        """
        const viewer = document.getElementById("viewer"), over = document.getElementById("over");
        const picks = all("#matrix .row:not([hidden]) .pick"), blink = document.getElementById("blink");
        answers.closed = viewer.hidden;
        picks[0].click();
        answers.one = viewer.hidden;
        picks[1].click();
        answers.two = viewer.hidden;
        answers.focused = document.activeElement.id;
        answers.pressed = all(".pick[aria-pressed=true]").map((button) => button.dataset.pick);
        answers.images = all("#viewer use").map((use) => use.getAttribute("href"));
        answers.chosen = picks.slice(0, 2).map((button) => button.querySelector("use").getAttribute("href"));
        set("wipe", "20", "input");
        answers.wiped = getComputedStyle(over).clipPath;
        blink.click();
        answers.seen = [];
        for (let n = 0; n < 4; n++) { answers.seen.push(getComputedStyle(over).visibility); await wait(600); }
        blink.click();
        answers.after = [getComputedStyle(over).visibility, blink.getAttribute("aria-pressed")];
        picks[2].click();
        answers.third = all(".pick[aria-pressed=true]").map((button) => picks.indexOf(button));
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
        answers.escaped = [viewer.hidden, all(".pick[aria-pressed=true]").length, document.activeElement === picks[2]];
        """,
    )
    assert opened.console == []
    found = opened.answers
    assert (found["closed"], found["one"], found["two"]) == (True, True, False)
    assert found["focused"] == "wipe", "the keyboard reaches its controls at once"
    assert found["pressed"] == ["A", "B"]
    assert found["images"] == found["chosen"]
    assert len(set(found["images"])) == 2
    assert found["wiped"] == "inset(0px 0px 0px 20%)"
    assert found["seen"] == ["visible", "hidden", "visible", "hidden"]
    assert found["after"] == ["visible", "false"]
    assert found["third"] == [1, 2]
    assert found["escaped"] == [True, 0, True]


def test_a_script_that_is_not_the_pages_own_does_not_run(page, tmp_path):
    opened = drive(page, tmp_path, "answers.ran = true;", allowed=False)
    assert 'id="answers"' not in opened.dom.replace(ANSWER, "")
    assert "Content Security Policy" in " ".join(opened.console)


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_is_wider_than_a_phone_or_a_desk(page, tmp_path, width):
    """The page stands in a frame of this width, because a browser's own window has a least one."""
    script = (
        "const root = document.documentElement;"
        "parent.postMessage({ width: innerWidth, over: root.scrollWidth - root.clientWidth }, '*');"
    )
    (tmp_path / "page.html").write_text(with_script(page, script), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="page.html" style="border:0;width:{width}px;height:800px"></iframe><pre id="answers"></pre>'
        "<script>onmessage = (event) => { answers.textContent = JSON.stringify(event.data); };</script>"
    )
    assert browse(frame, "--dump-dom", width=1500).answers == {"width": width, "over": 0}


def test_without_scripts_images_and_tables_are_there_and_controls_are_not(page, tmp_path):
    text = re.sub(r"<script>.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.S)
    (tmp_path / "off.html").write_text(text, encoding="utf-8")
    opened = browse(tmp_path / "off.html", "--dump-dom")
    assert opened.console == []
    assert len(re.findall(r'<div class="tools" hidden', opened.dom)) == 2
    assert not re.search(r"<(figure|li|table)[^>]* hidden", opened.dom)
    assert opened.dom.count("<summary>The numbers</summary>") == 3
    assert "<button" not in opened.dom[: opened.dom.index('id="viewer"')]
    shot = tmp_path / "shot.png"
    browse(tmp_path / "off.html", f"--screenshot={shot}", "--window-size=1400,3000")
    with Image.open(shot) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    bases = [color for color in colors if color[0] < 12 and abs(color[1] - 90) < 12 and color[2] > 243]
    assert bases, "the ground of the base's images, (0, 90, 255) but for WebP"

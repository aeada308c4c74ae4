"""The report: runs side by side, as one HTML page that needs no network."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sdtrain
from sdtrain.tools.compare import Comparison, compare, with_yardstick
from sdtrain.tools.compare.faults import faults_of, settings_of
from sdtrain.tools.compare.runs import Run
from sdtrain.tools.compare.text import HEADER, as_json, finite, rows
from sdtrain.tools.report.charts import Chart, charts_of
from sdtrain.tools.report.fit import Shown, fit
from sdtrain.tools.report.matrix import sample_matrix
from sdtrain.tools.report.metrics import metrics_table
from sdtrain.tools.report.numbers import (
    Difference,
    differences,
    differences_table,
    health_of,
)
from sdtrain.tools.report.others import evaluation_images, validation_images
from sdtrain.tools.report.page import render
from sdtrain.tools.report.recorded import Recorded, read_recorded
from sdtrain.tools.report.thumbnails import Gallery

FORMAT = 1
"""Of the JSON in the page; docs/report.md describes it."""
_SECTIONS = {
    "verdicts": "Verdicts",
    "differences": "What differs",
    "images": "Images",
    "loss": "Loss",
    "held-out": "Held-out images with the highest loss",
    "neighbors": "Nearest training images",
    "metrics": "All metrics",
    "health": "Health and hardware",
    "again": "Make it again",
}
"""In their order, by id."""


def report(root: Path, runs: Sequence[Run], notes: Sequence[str], metrics: Sequence[str], max_mb: int) -> str:
    """The page of these runs. The same runs give the same page.

    Args:
        root: the project's.
        notes: what else to say of the runs, beside the verdicts.
        metrics: to give verdicts by.
        max_mb: what the page may have, in 10⁶ bytes.

    Raises:
        InputError: a metric ranks nothing; no run's metrics belong to one state of the project; a run's table is
            broken; or the page has no room for its text.
    """
    comparisons = [with_yardstick(compare(list(runs), metric), root) for metric in metrics]
    recorded = [read_recorded(root, run) for run in runs]
    gallery = Gallery()
    matrix, sample_notes = sample_matrix(recorded, gallery)
    prompts, validation_notes = validation_images(recorded, gallery)
    found = [evaluation_images(run, gallery) for run in recorded]
    shown = Shown(matrix, prompts, found)
    differing, charts = differences(recorded), charts_of(recorded, _groups(comparisons[0], recorded))
    faults = {run.name: lines for run in runs if (lines := faults_of(run))}
    health = [health_of(run) for run in recorded]
    view = {
        "title": _title(recorded),
        "sections": _SECTIONS if len(runs) > 1 else {id: name for id, name in _SECTIONS.items() if id != "differences"},
        "runs": recorded,
        "faults": faults,
        "notes": [*notes, *(comparisons[0].notes if len(runs) == 1 else [])],
        "comparisons": [_comparison(comparison) for comparison in comparisons if len(runs) > 1],
        "differences": differences_table(differing, [run.name for run in recorded]),
        "matrix": matrix,
        "image_notes": _grouped(sample_notes + validation_notes, len(runs)),
        "prompts": prompts,
        "steps": sorted({step for prompt in prompts for track in prompt.tracks for step in track.steps}),
        "charts": charts,
        "found_images": found,
        "worst_notes": _grouped([(images.run, images.no_worst) for images in found], len(runs)),
        "neighbor_notes": _grouped([(images.run, images.no_neighbors) for images in found], len(runs)),
        "metrics": metrics_table(recorded),
        "health": _by_fact(health),
        "commands": _commands(recorded, metrics, max_mb),
        "sizes": gallery.sizes,
    }
    data = _data(recorded, comparisons, differing, charts, faults, health, shown)

    def page(images: dict[str, str], reduction: str) -> str:
        return render({**view, "reduction": reduction}, data, images, root)

    return fit(shown, gallery, max_mb, page)


def _title(runs: Sequence[Recorded]) -> str:
    names = ", ".join(run.name for run in runs[:3]) + (" …" if len(runs) > 3 else "")
    return names if len(runs) == 1 else f"{len(runs)} runs: {names}"


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {**as_json(comparison), "head": HEADER, "rows": rows(comparison)}


def _groups(comparison: Comparison, runs: Sequence[Recorded]) -> list[str]:
    """Of each run its recipe's name, if any recipe has several runs; else the run's own."""
    if all(len(ranked.recipe.runs) == 1 for ranked in comparison.ranked):
        return [run.name for run in runs]
    recipes = {
        run.name: ranked.recipe.name
        for ranked in comparison.ranked
        for run in (*ranked.recipe.runs.values(), *ranked.recipe.repeats)
    }
    return [recipes.get(run.name, run.name) for run in runs]


def _grouped(notes: Iterable[tuple[str, str | None]], num_runs: int) -> list[str]:
    """A sentence for each reason, which begins with the runs that have it; None is no reason."""
    runs: dict[str, dict[str, None]] = {}
    for run, reason in notes:
        if reason is not None:
            runs.setdefault(reason, {})[run] = None
    return [
        f"{f'All {num_runs} runs' if len(names) == num_runs > 1 else ', '.join(names)}: {reason}."
        for reason, names in runs.items()
    ]


def _by_fact(health: Sequence[dict[str, str]]) -> list[list[str]]:
    """A row for each fact, a column for each run."""
    facts = dict.fromkeys(fact for found in health for fact in found)
    return [[fact, *(found.get(fact, "") for found in health)] for fact in facts]


def _commands(runs: Sequence[Recorded], metrics: Sequence[str], max_mb: int) -> dict[str, Any]:
    """What makes the report again, and by its name each run."""
    again = {}
    for run in runs:
        apply = shlex.join(["dvc", "exp", "apply", run.name]) if run.is_experiment else f"git checkout {run.commit}"
        again[run.name] = "dvc repro" if run.commit is None else f"{apply} && dvc repro"
    # HEAD and branches move; experiments don't.
    revs = [run.name if run.is_experiment or run.commit is None else run.commit[:10] for run in runs]
    options = [part for metric in metrics for part in ("--metric", metric)] + ["--max-mb", str(max_mb)]
    return {"report": shlex.join(["sdtrain", "report", *revs, *options]), "runs": again}


def _data(
    runs: Sequence[Recorded],
    comparisons: Sequence[Comparison],
    differing: Sequence[Difference],
    charts: Sequence[Chart],
    faults: dict[str, list[str]],
    health: Sequence[dict[str, str]],
    shown: Shown,
) -> dict[str, Any]:
    """The numbers as JSON, as docs/report.md describes them."""
    tree = {
        "format": FORMAT,
        "sdtrain": sdtrain.__version__,
        "comparisons": [as_json(comparison) for comparison in comparisons],
        "runs": [
            {
                "name": run.name,
                "commit": run.commit,
                "time": run.time,
                "faults": faults.get(run.name, []),
                "params": settings_of(run.run)[0],
                "metrics": run.run.numbers,
                "health": facts,
            }
            for run, facts in zip(runs, health, strict=True)
        ],
        "differences": [vars(difference) for difference in differing],
        "samples": [
            {"text": row.text, "facts": row.facts, "guidance_scale": row.scale, "change": row.change}
            for row in shown.matrix.rows
        ],
        "held_out": [{"run": found.run, **entry.model_dump()} for found in shown.found for entry, _ in found.worst],
        "neighbors": [{"run": found.run, **found.neighbors.model_dump()} for found in shown.found if found.neighbors],
        "charts": [{"id": chart.id, "title": chart.title, "spec": chart.spec()} for chart in charts],
    }
    return finite(tree)

"""The card's table of metrics, base beside trained."""

import csv
import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, FiniteFloat, StringConstraints

from sdtrain.card.recorded import check, read_recorded
from sdtrain.ground.errors import InputError
from sdtrain.params.schema import EvaluateParams

_STAGE = "evaluate"
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")]
"""Of a metric: it stands in a table, so it may hold nothing that Markdown reads."""


class _Accuracy(BaseModel):
    """A row of the table of accuracies."""

    prompts: _Name
    field: _Name
    model: _Name
    ci_low: FiniteFloat
    ci_high: FiniteFloat
    num: int


def results(evaluate: EvaluateParams, metrics: Path, accuracy_table: Path) -> str:
    """A table of every metric that both models have.

    Args:
        evaluate: what both files were measured with.

    Raises:
        InputError: a file is missing or broken, or they aren't of one run.
    """
    numbers = read_recorded(metrics, dict[_Name, FiniteFloat], _STAGE)
    accuracies = _read_accuracies(accuracy_table)
    rows = _loss_rows(numbers, evaluate, metrics)
    for stem in [name.removesuffix("_base") for name in numbers if name.endswith("_base")]:
        if stem == "held_out_loss" or f"{stem}_trained" not in numbers:
            continue
        if found := re.fullmatch(r"([a-z0-9]+)_([a-z0-9_]+)_accuracy", stem):
            kind, field = found.groups()
            label = f"{field.replace('_', ' ')}, {'empty prompt' if kind == 'empty' else f'{kind} concepts'}"
            rows.append(_accuracy_row(stem, label, numbers, accuracies, metrics))
        elif found := re.fullmatch(r"([a-z]+)_gap", stem):
            rows.append(_gap_row(found[1], numbers, metrics))
        else:
            rows.append((stem.replace("_", " "), *(f"{numbers[f'{stem}_{m}']:.4g}" for m in ("base", "trained")), ""))
    table = [("", "base", "trained", "N"), ("---",) * 4, *rows]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return f"## Results\n\n{lines}\n\n{' '.join(_notes(evaluate, numbers, bool(accuracies)))}"


def _read_accuracies(table: Path) -> dict[str, _Accuracy]:
    """The rows by the name that the accuracy has in the metrics."""
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"{table}: can't be read: {error.strerror}; run `dvc repro {_STAGE}`") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: not a CSV file: {error}; run `dvc repro {_STAGE}`") from None
    accuracies = check(rows, list[_Accuracy], table, _STAGE)
    return {f"{row.prompts}_{row.field}_accuracy_{row.model}": row for row in accuracies}


def _loss_rows(numbers: dict[str, float], evaluate: EvaluateParams, metrics: Path) -> list[tuple[str, ...]]:
    gain = "held_out_loss_gain"
    needed = ["held_out_loss_base", "held_out_loss_trained", gain, f"{gain}_ci_low", f"{gain}_ci_high", "num_held_out"]
    missing = [name for name in needed if name not in numbers]
    if missing:
        raise InputError(f"{metrics}: has no {missing[0]}; run `dvc repro {_STAGE}`")
    *values, num = (numbers[name] for name in needed)
    base, trained, difference, low, high = (f"{value:.4g}" for value in values)
    num_images = f"{num:.0f} images"
    return [
        ("held-out loss, lower is better", base, trained, f"{num_images} × {evaluate.num_timesteps} timesteps"),
        ("its gain, base − trained", "", f"{difference} ({low} to {high})", num_images),
    ]


def _gap_row(condition: str, numbers: dict[str, float], metrics: Path) -> tuple[str, ...]:
    """The condition-use gap."""
    bounds = [f"{condition}_gap_trained_ci_{side}" for side in ("low", "high")]
    missing = [name for name in bounds if name not in numbers]
    if missing:
        raise InputError(f"{metrics}: has no {missing[0]}; run `dvc repro {_STAGE}`")
    base, trained, low, high = (
        f"{numbers[n]:.4g}" for n in (f"{condition}_gap_base", f"{condition}_gap_trained", *bounds)
    )
    label = f"its rise with another image's {'caption' if condition == 'text' else condition}"
    return label, base, f"{trained} ({low} to {high})", f"{numbers['num_held_out']:.0f} images"


def _accuracy_row(
    stem: str, label: str, numbers: dict[str, float], accuracies: dict[str, _Accuracy], metrics: Path
) -> tuple[str, ...]:
    cells = []
    for name in (f"{stem}_base", f"{stem}_trained"):
        if name not in accuracies:
            raise InputError(f"{metrics}: has {name}, which the table of accuracies hasn't; run `dvc repro {_STAGE}`")
        values = (numbers[name], accuracies[name].ci_low, accuracies[name].ci_high)
        share, low, high = (f"{100 * value:.1f} %" for value in values)
        cells.append(f"{share} ({low} to {high})")
    return label, *cells, str(accuracies[f"{stem}_trained"].num)


def _notes(evaluate: EvaluateParams, numbers: dict[str, float], has_accuracies: bool) -> list[str]:
    notes = ["In parentheses are 95 % intervals."]
    if numbers["held_out_loss_gain_ci_low"] <= 0:
        notes.append("The gain's reaches 0: these images don't show that training helped.")
    notes.append(
        "The held-out loss is the squared error of the implied noise ε on images that weren't trained on, at fixed "
        "timesteps and with fixed noise."
    )
    notes.append("Its rise with another image's condition shows how much the model uses that condition.")
    if any(name.endswith("_hint_accuracy_trained") for name in numbers):
        notes.append(
            "The rows “hint” are the mean intersection over union of the drawn object with the one that the hint "
            "outlines, which the base doesn't see."
        )
    if has_accuracies:
        notes.append(
            "The other rows are shares of images that show what their prompt says, measured on the pixels "
            f"({evaluate.num_inference_steps} steps, guidance scale {evaluate.guidance_scale:g}). Of prompts with new "
            "concepts, color, shape and style count where the prompt's own is new."
        )
    return notes

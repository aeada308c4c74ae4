"""The card's table of metrics, base beside trained."""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

from huggingface_hub import EvalResult
from pydantic import BaseModel, FiniteFloat, StringConstraints

from sdtrain.card.image_sets import image_set_notes, image_set_rows
from sdtrain.card.recorded import Model
from sdtrain.ground.errors import InputError
from sdtrain.ground.records import check_record, read_record
from sdtrain.params.schema import EvaluateParams

_STAGE = "evaluate"
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")]
"""Of a metric: it stands in a table, so it may hold nothing that Markdown reads."""


_RELIGHTING = {
    "light_direction_accuracy": ("direction of the light, right within 45°", " %"),
    "light_direction_error_deg": ("error of this direction, lower is better", "°"),
    "albedo_error": ("relative error of the object's albedo, lower is better", ""),
    "albedo_chroma_error": ("the same at the best exposure, lower is better", ""),
    "color_accuracy": ("object has its named colour", " %"),
    "foreground_iou": ("object is where it should be, intersection over union", " %"),
    "linearity_error": ("error of adding two lights up, lower is better", ""),
    "light_sensitivity": ("difference between these two lights", ""),
}
"""Metrics of relighting in words, with their unit. The second of the last two tells what the first is worth."""
_LOSSES = {
    "held_out_loss_null_text": "held-out loss without captions",
    "held_out_loss_min_snr": "held-out loss, min-SNR weighted",
    "train_loss": "loss of as many training images",
    "guidance_magnitude_train": "how far training captions move the prediction of noise",
    "guidance_magnitude_held_out": "how far held-out captions do",
}
"""Further metrics of held-out and training images in words."""


class _Interval(BaseModel):
    """What a row of either table has."""

    model: _Name
    ci_low: FiniteFloat
    ci_high: FiniteFloat
    num: int


class _Accuracy(_Interval):
    """A row of the table of accuracies."""

    prompts: _Name
    attribute: _Name

    @property
    def name(self) -> str:
        return f"{self.prompts}_{self.attribute}_accuracy"


class _Relighting(_Interval):
    """A row of the table of relighting."""

    metric: _Name

    @property
    def name(self) -> str:
        return self.metric


_Row = TypeVar("_Row", _Accuracy, _Relighting)


def results(
    model: Model,
    evaluate: EvaluateParams,
    metrics: Path,
    image_sets: Path,
    accuracy_table: Path,
    relighting_table: Path,
) -> str:
    """A table of every metric that both models have.

    Args:
        evaluate: what the files were measured with.

    Raises:
        InputError: a file is missing or broken, or they aren't of one run.
    """
    numbers = _read_numbers(metrics)
    accuracies, relighting = _read_table(accuracy_table, _Accuracy), _read_table(relighting_table, _Relighting)
    drawn = _read_numbers(image_sets)
    rows = _loss_rows(numbers, evaluate, metrics)
    stems = [name.removesuffix("_base") for name in numbers if name.endswith("_base")]
    order = {stem: place for place, stem in enumerate(_LOSSES)}
    for stem in sorted(stems, key=lambda stem: order.get(stem, len(order))):
        if stem == "held_out_loss" or stem in _RELIGHTING or f"{stem}_trained" not in numbers:
            continue
        if found := re.fullmatch(r"([a-z0-9]+)_([a-z0-9_]+)_accuracy", stem):
            kind, attribute = found.groups()
            label = f"{attribute.replace('_', ' ')}, {'empty prompt' if kind == 'empty' else f'{kind} concepts'}"
            rows.append(_measured_row(stem, label, numbers, accuracies, "accuracies", metrics))
        elif found := re.fullmatch(r"([a-z]+)_gap", stem):
            rows.append(_gap_row(found[1], numbers, metrics))
        elif stem in _LOSSES:
            both = (f"{numbers[f'{stem}_{model}']:.4g}" for model in ("base", "trained"))
            rows.append((_LOSSES[stem], *both, f"{numbers['num_held_out']:.0f} images"))
        else:
            rows.append((stem.replace("_", " "), *(f"{numbers[f'{stem}_{m}']:.4g}" for m in ("base", "trained")), ""))
    rows += _relighting_rows(numbers, relighting, metrics) + image_set_rows(drawn, image_sets)
    table = [("", "base", "trained", "N"), ("---",) * 4, *rows]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in table)
    notes = _notes(model, evaluate, numbers, bool(accuracies), bool(relighting)) + image_set_notes(drawn)
    return f"## Results\n\n{lines}\n\n{' '.join(notes)}"


def eval_results(metrics: Path, image_sets: Path, dataset: str, source: str, task: str) -> list[EvalResult]:
    """The trained model's metrics, as `model-index` in the card's header has them for the hub.

    Args:
        dataset: what the metrics are of, in words; some are of prompts about the same world.
        source: the images' repository, or what kind of data set they are.
        task: the hub's name of what the model does.

    Raises:
        InputError: a file is missing or broken.
    """
    numbers = _read_numbers(metrics) | _read_numbers(image_sets)
    stems = [name.removesuffix("_trained") for name in numbers if name.endswith("_trained")]
    return [
        EvalResult(
            task_type=task,
            dataset_name=dataset,
            dataset_type=source,
            metric_type=stem,
            metric_name=stem.replace("_", " "),
            metric_value=numbers[f"{stem}_trained"],
        )
        for stem in stems
    ]


def _read_numbers(file: Path) -> dict[str, float]:
    return read_record(file, dict[_Name, FiniteFloat], _STAGE)


def _read_table(table: Path, kind: type[_Row]) -> dict[str, _Row]:
    """The rows by the name that they have in the metrics."""
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"{table}: can't be read: {error.strerror}; run `dvc repro {_STAGE}`") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: not a CSV file: {error}; run `dvc repro {_STAGE}`") from None
    return {f"{row.name}_{row.model}": row for row in check_record(rows, list[kind], str(table), _STAGE)}


def _loss_rows(numbers: dict[str, float], evaluate: EvaluateParams, metrics: Path) -> list[tuple[str, ...]]:
    gain = "held_out_loss_gain"
    needed = ["held_out_loss_base", "held_out_loss_trained", gain, f"{gain}_ci_low", f"{gain}_ci_high", "num_held_out"]
    _check_complete(numbers, needed, metrics)
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
    _check_complete(numbers, bounds, metrics)
    base, trained, low, high = (
        f"{numbers[n]:.4g}" for n in (f"{condition}_gap_base", f"{condition}_gap_trained", *bounds)
    )
    label = f"its rise with another image's {'caption' if condition == 'text' else condition}"
    return label, base, f"{trained} ({low} to {high})", f"{numbers['num_held_out']:.0f} images"


def _relighting_rows(
    numbers: dict[str, float], relighting: dict[str, _Relighting], metrics: Path
) -> list[tuple[str, ...]]:
    """Those of every metric, so that none stands without what makes it readable; none if nothing was relit."""
    if not relighting and not any(f"{metric}_trained" in numbers for metric in _RELIGHTING):
        return []
    models = ("base", "trained", "copy", "vae")
    _check_complete(numbers, [f"{metric}_{model}" for metric in _RELIGHTING for model in models], metrics)
    return [
        _measured_row(metric, label, numbers, relighting, "relighting", metrics, unit)
        for metric, (label, unit) in _RELIGHTING.items()
    ]


def _measured_row(
    stem: str,
    label: str,
    numbers: dict[str, float],
    intervals: Mapping[str, _Interval],
    table: str,
    metrics: Path,
    unit: str = " %",
) -> tuple[str, ...]:
    cells = []
    for name in (f"{stem}_base", f"{stem}_trained"):
        if name not in intervals:
            raise InputError(f"{metrics}: has {name}, which the table of {table} hasn't; run `dvc repro {_STAGE}`")
        values = (numbers[name], intervals[name].ci_low, intervals[name].ci_high)
        found, low, high = (_with_unit(value, unit) for value in values)
        cells.append(f"{found} ({low} to {high})")
    return label, *cells, str(intervals[f"{stem}_trained"].num)


def _with_unit(value: float, unit: str) -> str:
    return {" %": f"{100 * value:.1f} %", "°": f"{value:.1f}°", "": f"{value:.3g}"}[unit]


def _check_complete(numbers: dict[str, float], needed: list[str], metrics: Path) -> None:
    missing = [name for name in needed if name not in numbers]
    if missing:
        raise InputError(f"{metrics}: has no {missing[0]}; run `dvc repro {_STAGE}`")


def _choice_of_checkpoint(model: Model, num_held_out: int) -> list[str]:
    """Whether the held-out loss is of images that the checkpoint was chosen on; no words if there is nothing to say."""
    config, is_best = model.config, model.config.export.checkpoint == "best"
    num_choosing = min(config.num_validation, config.params.validation.max_samples)
    if config.params.dataset.test_fraction:
        chosen = f"; the checkpoint was chosen on {num_choosing:,} others" if is_best else ""
        return [f"It was measured on {num_held_out:,} test images{chosen}."]
    if not is_best:
        return []
    num_both = min(num_choosing, num_held_out)
    return [f"The checkpoint was chosen on {num_both:,} of these {num_held_out:,} images, which favours it a little."]


def _notes(
    model: Model, evaluate: EvaluateParams, numbers: dict[str, float], has_accuracies: bool, has_relighting: bool
) -> list[str]:
    notes = ["In parentheses are 95 % intervals."]
    if numbers["held_out_loss_gain_ci_low"] <= 0:
        notes.append("The gain's reaches 0: these images don't show that training helped.")
    notes.append(
        "The held-out loss is the squared error of the implied noise ε on images that weren't trained on, at fixed "
        "timesteps and with fixed noise."
    )
    notes += _choice_of_checkpoint(model, int(numbers["num_held_out"]))
    notes.append("Its rise with another image's condition shows how much the model uses that condition.")
    if any(name.endswith("_hint_accuracy_trained") for name in numbers):
        notes.append(
            "The rows “hint” are the mean intersection over union of the drawn object with the one that the hint "
            "outlines, which the base doesn't see."
        )
    if has_accuracies:
        notes.append(
            "The rows of concepts are shares of images that show what their prompt says, measured on the pixels "
            f"({evaluate.num_inference_steps} steps, guidance scale {evaluate.guidance_scale:g}). Of prompts with new "
            "concepts, color, shape and style count where the prompt's own is new."
        )
    if has_relighting:
        notes += _relighting_notes(evaluate, numbers)
    return notes


def _relighting_notes(evaluate: EvaluateParams, numbers: dict[str, float]) -> list[str]:
    def floors(model: str) -> str:
        direction, albedo, error, difference = (
            _with_unit(numbers[f"{metric}_{model}"], _RELIGHTING[metric][1])
            for metric in ("light_direction_accuracy", "albedo_error", "linearity_error", "light_sensitivity")
        )
        return (
            f"the direction right in {direction}, an albedo error of {albedo}, and in adding up an error of {error} at "
            f"a difference of {difference}"
        )

    return [
        "The rows of light and object are measured on the pixels of images of scenes that are in no data set "
        f"({evaluate.num_inference_steps} steps, guidance scale {evaluate.guidance_scale:g}); lights are added up and "
        "compared in linear light, relative to the image under both.",
        "Of adding up, read the error together with the difference: a model that ignores the light has 1 and 0.",
        f"For comparison, a copy of the foreground as it is given has {floors('copy')}; the truth, encoded and decoded "
        f"by the VAE, which no model that draws through this VAE can be expected to beat, has {floors('vae')}.",
    ]

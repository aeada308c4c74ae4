"""Every number that `evaluate` wrote, as a table: metrics by name, runs beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sdtrain.ground.metric_names import IMAGE_SET, better_direction, counted_by
from sdtrain.tools.report.recorded import Recorded

_MODELS = ("base", "trained", "gain", "floor", "real", "copy", "vae")
"""With which a metric's name can end: models, how they differ, and what a metric is worth without one."""

_DIFFERS = "_differs_from_real"
"""With which the name of a verdict ends, 0 or 1."""

Bounds = tuple[float, float, float | None]
"""Of a 95 % interval; and N, if it is known."""


@dataclass
class Cell:
    """A metric of one run."""

    value: str = ""
    interval: str = ""
    num: str = ""
    others: list[tuple[str, str]] = field(default_factory=list)
    """Of other models, the base's where it differs between runs; and whether images can be told from real ones."""


@dataclass
class Metric:
    """A metric of all runs."""

    name: str
    better: str
    """`lower`, `higher`, or nothing if neither is better."""
    base: str
    """Of all runs, if it is the same; else empty."""
    cells: list[Cell]


def evaluated(run: Recorded) -> dict[str, float]:
    """All numbers that `evaluate` wrote, by name."""
    return run.numbers("evaluate.json") | run.numbers("image_sets.json")


def metrics_table(runs: Sequence[Recorded]) -> list[Metric]:
    """Every number that `evaluate` wrote, by name, with its interval and N where they are known."""
    numbers = [evaluated(run) for run in runs]
    bounds = [_bounds(run, found) for run, found in zip(runs, numbers, strict=True)]
    stems: dict[str, None] = {}
    for found in numbers:
        stems |= dict.fromkeys(_split(name, found) for name in found if not _belongs_to_another(name, found))
    stems.pop(IMAGE_SET, None)  # a number without a meaning of its own
    table = []
    for stem in stems:
        cells = [_cell(stem, found, known) for found, known in zip(numbers, bounds, strict=True)]
        bases = {dict(cell.others).get("base", "") for cell in cells}
        base = bases.pop() if len(bases) == 1 else ""
        if base:
            for cell in cells:
                cell.others = [other for other in cell.others if other[0] != "base"]
        trained = f"{stem}_trained"
        better = better_direction(trained) if any(trained in found for found in numbers) else None
        table.append(Metric(stem, better or "", base, cells))
    return table


def _split(name: str, numbers: dict[str, float]) -> str:
    """Of `held_out_loss_base` the metric, without the model; of a number that isn't about a model its whole name."""
    stem, _, model = name.rpartition("_")
    return stem if model in _MODELS and f"{stem}_trained" in numbers else name


def _belongs_to_another(name: str, numbers: dict[str, float]) -> bool:
    if name.endswith(_DIFFERS):
        return f"{name.removesuffix(_DIFFERS)}_trained" in numbers
    return any(name.removesuffix(end) in numbers for end in ("_ci_low", "_ci_high", "_num") if name.endswith(end))


def _bounds(run: Recorded, numbers: dict[str, float]) -> dict[str, Bounds]:
    """95 % intervals, and N if it is known, by the number's name: those beside it, and those of the tables."""
    found = {
        name: (numbers[f"{name}_ci_low"], numbers[f"{name}_ci_high"], numbers.get(f"{name}_num"))
        for name in numbers
        if f"{name}_ci_low" in numbers and f"{name}_ci_high" in numbers
    }
    for table, stem in (("prompt_accuracy.csv", "{prompts}_{attribute}_accuracy"), ("relighting.csv", "{metric}")):
        for row in run.texts(table):
            if not {"model", "ci_low", "ci_high", "num"} <= row.keys():
                continue
            name = f"{stem.format(**row)}_{row['model']}"
            found[name] = (float(row["ci_low"]), float(row["ci_high"]), float(row["num"]))
    return found


def _cell(stem: str, numbers: dict[str, float], bounds: dict[str, Bounds]) -> Cell:
    own = f"{stem}_trained" if f"{stem}_trained" in numbers else stem
    others = [
        (model, " ".join(filter(None, [number_text(numbers[name]), _interval(bounds.get(name))])))
        for model in _MODELS
        if own != stem and (name := f"{stem}_{model}") in numbers and name != own
    ]
    if (verdict := f"{stem}{_DIFFERS}") in numbers:
        others.append(("told from real images:", "yes" if numbers[verdict] else "no"))
    num = bounds[own][2] if own in bounds else None
    if num is None and (counted := counted_by(stem)):
        num = numbers.get(counted)
    value = number_text(numbers[own]) if own in numbers else ""
    return Cell(value, _interval(bounds.get(own)), "" if num is None or not value else f"{num:.0f}", others)


def _interval(bounds: Bounds | None) -> str:
    return "" if bounds is None else f"({number_text(bounds[0])} to {number_text(bounds[1])})"


def number_text(number: float) -> str:
    """Four digits, or all of a count."""
    return f"{number:,.0f}" if isinstance(number, int) else f"{number:.4g}"

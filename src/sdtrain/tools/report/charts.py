"""The report's charts: what they show, as Vega-Lite 5 draws it, and as a table for where no script runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdtrain.tools.report.recorded import Recorded, Row

_MAX_POINTS = 300
"""Of a line: as many as can be told apart on a screen."""
_MAX_TABLE_ROWS = 20
_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
"""Names the language; nothing loads it."""


@dataclass(frozen=True)
class Line:
    """A series of one run."""

    name: str
    run: int | None
    """The run's number, which decides on the colour; None of a base that all runs share."""
    is_dashed: bool
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Lines over one axis."""

    id: str
    title: str
    x: str
    y: str
    lines: list[Line]
    is_log: bool = False

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows; of long curves evenly spread rows, the last one among them."""
        values = [dict(line.points) for line in self.lines]
        steps = sorted({x for found in values for x in found})
        rows = [
            [f"{x:g}", *(f"{found[x]:.4g}" if x in found else "" for found in values)]
            for x in _spread(steps, _MAX_TABLE_ROWS)
        ]
        return [self.x, *(line.name for line in self.lines)], rows

    def spec(self) -> dict[str, Any]:
        """For Vega-Lite; the page's script adds colours, by the field `color` of the lines in `usermeta`."""
        rows = [
            {"line": line.name, "x": x, "y": y} for line in self.lines for x, y in _spread(line.points, _MAX_POINTS)
        ]
        names = [line.name for line in self.lines]
        scale = {"type": "log"} if self.is_log else {"zero": False}
        return {
            "$schema": _SCHEMA,
            "usermeta": {"colors": [line.run for line in self.lines]},
            "width": "container",
            "height": 240,
            "data": {"values": rows},
            "mark": {"type": "line", "point": {"size": 18}, "strokeWidth": 1.75, "tooltip": True},
            "encoding": {
                "x": {"field": "x", "type": "quantitative", "title": self.x, "scale": {"nice": False}},
                "y": {"field": "y", "type": "quantitative", "title": self.y, "scale": scale},
                "color": {"field": "line", "type": "nominal", "title": None, "scale": {"domain": names}},
                "strokeDash": {
                    "field": "line",
                    "type": "nominal",
                    "title": None,
                    "scale": {"domain": names, "range": [[5, 4] if line.is_dashed else [1, 0] for line in self.lines]},
                },
                "tooltip": [
                    {"field": "line", "title": "run"},
                    {"field": "x", "title": self.x},
                    {"field": "y", "title": self.y, "format": ".5g"},
                ],
            },
        }


def charts_of(runs: Sequence[Recorded]) -> list[Chart]:
    """The charts that have data."""
    by_timestep = [run.table("loss_by_timestep.csv", ["timestep", "base", "trained"]) for run in runs]
    held_out = [run.table("validation.csv", ["step", "loss_raw"]) for run in runs]
    training = [run.table("train.csv", ["step", "loss_smoothed"]) for run in runs]
    found = [
        Chart(
            "loss-by-timestep",
            "Held-out loss by timestep",
            "timestep, 0 the cleanest",
            "held-out loss, logarithmic",
            _bases(runs, by_timestep) + _lines(runs, by_timestep, "timestep", "trained"),
            is_log=True,
        ),
        Chart(
            "held-out-loss",
            "Held-out loss while it trained",
            "step",
            "loss of the averaged weights (EMA), or of raw ones",
            _lines(runs, held_out, "step", "loss_ema", instead="loss_raw"),
        ),
        Chart(
            "training-loss",
            "Training loss",
            "step",
            "loss, moving average",
            _lines(runs, training, "step", "loss_smoothed"),
        ),
    ]
    return [chart for chart in found if chart.lines]


def _bases(runs: Sequence[Recorded], tables: Sequence[list[Row]]) -> list[Line]:
    """One line if all runs have the same base."""
    lines = _lines(runs, tables, "timestep", "base", " (base)", is_dashed=True)
    if len({tuple(line.points) for line in lines}) == 1:
        return [Line("base", None, True, lines[0].points)]
    return lines


def _lines(
    runs: Sequence[Recorded],
    tables: Sequence[list[Row]],
    x: str,
    y: str,
    suffix: str = "",
    is_dashed: bool = False,
    instead: str = "",
) -> list[Line]:
    """A line for each run that has the column `y`, or the one `instead`."""
    found = []
    for number, (run, rows) in enumerate(zip(runs, tables, strict=True)):
        column = y if rows and y in rows[0] else instead
        values = [(row.get(x), row.get(column)) for row in rows]
        points = [(at, value) for at, value in values if None not in (at, value) and math.isfinite(value)]
        if points:
            found.append(Line(run.name + suffix, number, is_dashed, points))
    return found


def _spread(values: Sequence[Any], num: int) -> list[Any]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(values) <= num:
        return list(values)
    return [values[round(place * (len(values) - 1) / (num - 1))] for place in range(num)]

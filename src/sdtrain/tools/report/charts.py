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
    group: str
    """What the legend names; the lines of a group have one colour."""
    is_base: bool
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
        """For Vega-Lite; the page's script gives the groups their colours, grey to the bases that `usermeta` names."""
        rows = [
            {"line": line.name, "group": line.group, "x": x, "y": y}
            for line in self.lines
            for x, y in _spread(line.points, _MAX_POINTS)
        ]
        groups = {line.group: line.is_base for line in self.lines}
        dashes = [[5, 4] if is_base else [1, 0] for is_base in groups.values()]
        scale = {"type": "log"} if self.is_log else {"zero": False}
        axis = {"tickCount": 4} if self.is_log else {}
        return {
            "$schema": _SCHEMA,
            "description": self.title,
            "usermeta": {"bases": [group for group, is_base in groups.items() if is_base]},
            "width": "container",
            "height": 240,
            "data": {"values": rows},
            "mark": {"type": "line", "point": {"size": 18}, "strokeWidth": 1.75, "tooltip": True},
            "encoding": {
                "x": {"field": "x", "type": "quantitative", "title": self.x, "scale": {"nice": False}},
                "y": {"field": "y", "type": "quantitative", "title": self.y, "scale": scale, "axis": axis},
                "detail": {"field": "line", "type": "nominal"},
                "color": {"field": "group", "type": "nominal", "title": None, "scale": {"domain": list(groups)}},
                "strokeDash": {
                    "field": "group",
                    "type": "nominal",
                    "title": None,
                    "scale": {"domain": list(groups), "range": dashes},
                },
                "tooltip": [
                    {"field": "line", "title": "run"},
                    {"field": "x", "title": self.x},
                    {"field": "y", "title": self.y, "format": ".5g"},
                ],
            },
        }


def charts_of(runs: Sequence[Recorded], groups: Sequence[str]) -> list[Chart]:
    """The charts that have data.

    Args:
        groups: of each run, the name of what it is a replicate of.
    """
    by_timestep = [run.table("loss_by_timestep.csv", ["timestep", "base", "trained"]) for run in runs]
    held_out = [run.table("validation.csv", ["step", "loss_raw"]) for run in runs]
    training = [run.table("train.csv", ["step", "loss_smoothed"]) for run in runs]

    def lines(tables: Sequence[list[Row]], x: str, *columns: str) -> list[Line]:
        """Of each run's first of these columns."""
        found = []
        for run, group, rows in zip(runs, groups, tables, strict=True):
            column = next((name for name in columns if rows and name in rows[0]), "")
            values = [(row.get(x), row.get(column)) for row in rows]
            points = [(at, value) for at, value in values if None not in (at, value) and math.isfinite(value)]
            if points:
                found.append(Line(run.name, group, False, points))
        return found

    found = [
        Chart(
            "loss-by-timestep",
            "Held-out loss by timestep",
            "timestep, 0 the cleanest",
            "held-out loss, logarithmic",
            _bases(lines(by_timestep, "timestep", "base")) + lines(by_timestep, "timestep", "trained"),
            is_log=True,
        ),
        Chart(
            "held-out-loss",
            "Held-out loss while it trained, of the averaged weights (EMA) if there are such",
            "step",
            "held-out loss",
            lines(held_out, "step", "loss_ema", "loss_raw"),
        ),
        Chart(
            "training-loss",
            "Training loss, its moving average",
            "step",
            "training loss",
            lines(training, "step", "loss_smoothed"),
        ),
    ]
    return [chart for chart in found if chart.lines]


def _bases(lines: Sequence[Line]) -> list[Line]:
    """A line for each base that isn't the same as another run's."""
    distinct: dict[tuple, Line] = {}
    for line in lines:
        distinct.setdefault(tuple(line.points), line)
    names = ["base"] if len(distinct) == 1 else [f"base of {line.group}" for line in distinct.values()]
    return [Line(name, name, True, list(points)) for name, points in zip(names, distinct, strict=True)]


def _spread(values: Sequence[Any], num: int) -> list[Any]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(values) <= num:
        return list(values)
    return [values[round(place * (len(values) - 1) / (num - 1))] for place in range(num)]

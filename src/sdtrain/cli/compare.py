"""`sdtrain compare`: which recipe is better, over training seeds and images."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdtrain.tools.compare import Comparison

DEFAULT_METRIC = "held_out_loss_trained"


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compare",
        help="rank recipes by a metric, with verdicts over training seeds",
        description="Rank recipes by a metric. Runs that differ in train.seed alone are replicates of one recipe.",
    )
    add_revs(command)
    add_metric(command)
    command.add_argument("--baseline", metavar="REV", help="a run of the recipe that the others are held against")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_compare)


def add_revs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "revs",
        nargs="*",
        metavar="REV",
        help="experiment, branch, tag, commit or workspace; without one HEAD and its experiments",
    )


def add_metric(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--metric",
        action=_Once,
        default=DEFAULT_METRIC,
        help="to rank by: a number of metrics/*.json of which less or more is better (%(default)s)",
    )


class _Once(argparse.Action):
    """Refuses an option that is given again, of which the first would go unheard."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str,
        option_string: str | None = None,
    ) -> None:
        if option_string in vars(namespace).setdefault("given", set()):
            parser.error(f"{option_string} is given twice; ranks are by one metric, `sdtrain report` shows several")
        namespace.given.add(option_string)
        setattr(namespace, self.dest, values)


def _compare(options: argparse.Namespace) -> None:
    from sdtrain.tools.compare import compare, with_yardstick
    from sdtrain.tools.compare.runs import read_run, read_runs
    from sdtrain.tools.compare.text import as_json

    root = Path()
    runs, notes = read_runs(root, options.revs)
    if options.baseline is not None and options.baseline not in {run.name for run in runs}:
        runs.append(read_run(root, options.baseline))
    comparison = with_yardstick(compare(runs, options.metric, options.baseline), root)
    comparison = replace(comparison, notes=notes + comparison.notes)
    if options.json:
        print(json.dumps(as_json(comparison), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print_comparison(comparison)


def print_comparison(comparison: "Comparison") -> None:
    """Print the table, the sentences, the notes, and what is wrong with runs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sdtrain.tools.compare.text import HEADER, rows, sentences

    is_terminal = sys.stdout.isatty()
    # No width, because Rich would shorten numbers to fit one; a terminal breaks what is too long itself.
    console = Console(file=sys.stdout, width=10_000)
    table = Table(box=box.SIMPLE_HEAD if is_terminal else None, pad_edge=False)
    for number, name in enumerate(HEADER):
        table.add_column(name, justify="left" if number in (0, len(HEADER) - 1) else "right")
    for row in rows(comparison):
        table.add_row(*map(Text, row))
    reference = f"the recipe of {comparison.reference_of}"
    if comparison.is_best:
        reference = "the best" if comparison.reference is comparison.ranked[0] else "the best with several seeds"
    num = "" if comparison.num_images is None else f", N = {comparison.num_images} images"
    console.print(Text(f"{comparison.metric}, {comparison.better} is better{num}; the reference is {reference}"))
    console.print(table)
    faults = [f"WARNING: {name}: {fault}" for name, found in comparison.faults.items() for fault in found]
    for line in [*sentences(comparison), *(f"Note: {note}" for note in comparison.notes), *faults]:
        console.print(Text(line))

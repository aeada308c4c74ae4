"""`sdtrain sweep`: params × values × seeds, as DVC experiments."""

import argparse
import sys
from pathlib import Path

from sdtrain.cli.compare import add_metric, print_comparison
from sdtrain.cli.options import positive
from sdtrain.ground.errors import InputError
from sdtrain.ground.metric_names import better_direction


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "sweep",
        help="run every combination of some params' values as DVC experiments",
        description="Run every combination of some params' values as DVC experiments, several at once. "
        "The same command resumes a sweep that was stopped.",
    )
    command.add_argument(
        "assignments", nargs="+", metavar="key=value,…", help="e.g. train.lr=1e-4,2e-4 train.seed=0..4 (both included)"
    )
    command.add_argument("--jobs", type=positive, help="tasks at once (one per GPU, or per NPROC GPUs; 1 without)")
    command.add_argument("--name", help="begins the experiments' names")
    command.add_argument("--dry-run", action="store_true", help="check all combinations and list them")
    add_metric(command)
    command.set_defaults(run=_sweep)


def _sweep(options: argparse.Namespace) -> None:
    from sdtrain.tools.sweep import run_sweep

    if better_direction(options.metric) is None:  # before hours of work
        raise InputError(
            f"--metric {options.metric}: not a measure of the trained model, such as held_out_loss_trained or "
            "new_color_accuracy_trained"
        )
    result = run_sweep(options.assignments, num_jobs=options.jobs, prefix=options.name, dry_run=options.dry_run)
    if result.experiments and not options.dry_run:
        _rank(result.experiments, options.metric)
    if result.failed:
        sys.exit(1)


def _rank(experiments: list[str], metric: str) -> None:
    """Print what `sdtrain compare` says of them; the experiments are made, even if it can't rank them."""
    from sdtrain.tools.compare import compare, with_yardstick
    from sdtrain.tools.compare.runs import read_run

    try:
        runs = [read_run(Path(), name) for name in experiments]
        print_comparison(with_yardstick(compare(runs, metric), Path()))
    except InputError as fault:
        print(f"not ranked: {fault}")

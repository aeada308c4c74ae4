"""`sdtrain sweep`: params × values × seeds, as DVC experiments."""

import argparse
import sys

from sdtrain.cli.options import positive


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
    command.set_defaults(run=_sweep)


def _sweep(options: argparse.Namespace) -> None:
    from sdtrain.tools.sweep import run_sweep

    result = run_sweep(options.assignments, num_jobs=options.jobs, prefix=options.name, dry_run=options.dry_run)
    if result.failed:
        sys.exit(1)

"""`sdtrain report`: runs side by side, as one HTML page."""

import argparse
from pathlib import Path

from sdtrain.cli.compare import DEFAULT_METRIC, add_revs
from sdtrain.cli.options import positive
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import write_bytes


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "report",
        help="show runs side by side in one HTML file",
        description="Write one HTML file with verdicts, images, curves and numbers of runs. It needs no network.",
    )
    add_revs(command)
    command.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="(%(default)s)")
    command.add_argument(
        "--metric", action="append", help=f"to give verdicts by; may be given several times ({DEFAULT_METRIC})"
    )
    command.add_argument(
        "--max-mb", type=positive, default=10, help="the file's size at most; images are reduced (%(default)s)"
    )
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from sdtrain.tools.compare.runs import read_runs
    from sdtrain.tools.report import report

    root = Path()
    if options.output.is_dir():
        raise InputError(f"--output {options.output}: is a folder; name a file in it")
    runs, notes = read_runs(root, options.revs)
    page = report(root, runs, notes, list(dict.fromkeys(options.metric or [DEFAULT_METRIC])), options.max_mb)
    content = page.encode(errors="replace")  # of a caption's text, what is no text
    try:
        write_bytes(options.output, content)
    except OSError as error:
        raise InputError(f"--output {options.output}: can't be written: {error.strerror}") from None
    print(f"{options.output}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {len(content) / 1e6:.1f} MB")

"""The commands outside DVC, each in a module that adds it to the parser."""

import argparse
import os
import sys

from sdtrain.cli import compare, generate, plan, report, sweep
from sdtrain.ground.errors import InputError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="sdtrain", description="Fine-tune Stable Diffusion; see README.md.")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (generate, plan, sweep, compare, report):
        module.add(commands)
    options = parser.parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises torchvision, which nothing here needs
    try:
        options.run(options)
    except InputError as error:
        sys.exit(f"error: {error}")

"""`sdtrain plan` and `sdtrain overfit`: what a params file will do, and whether it can learn at all."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sdtrain.cli.options import positive
from sdtrain.ground.errors import InputError

if TYPE_CHECKING:
    from sdtrain.training.files import TrainFiles


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("plan", help="say what a params file will do, without training")
    _add_places(command)
    command.add_argument("--dataset", type=Path, default="data/dataset", help="checked images (%(default)s)")
    command.add_argument("--time-steps", type=positive, default=0, help="train this many steps to measure their time")
    command.set_defaults(run=_plan)

    command = commands.add_parser("overfit", help="check that one batch can be learned, if a run learns nothing")
    _add_places(command)
    command.add_argument("--steps", type=positive, default=300, help="optimizer steps (%(default)s)")
    command.add_argument("--rows", type=positive, default=4, help="images in the batch (%(default)s)")
    command.set_defaults(run=_overfit)


def _add_places(command: argparse.ArgumentParser) -> None:
    command.add_argument("--params", type=Path, default="params.yaml", help="params file (%(default)s)")
    command.add_argument("--base", type=Path, default="data/base", help="resolved base model (%(default)s)")
    command.add_argument("--latents", type=Path, default="data/latents", help="latent cache (%(default)s)")


def _plan(options: argparse.Namespace) -> None:
    from sdtrain.params.load import load_params
    from sdtrain.tools.plan import plan_run

    params = load_params(options.params)
    for line in plan_run(params, _files(options), options.dataset, options.time_steps):
        print(line)


def _overfit(options: argparse.Namespace) -> None:
    from sdtrain.params.load import load_params
    from sdtrain.tools.overfit import overfit_batch

    if os.environ.get("NPROC", "1") != "1":
        raise InputError(f"overfit runs in one process, but NPROC = {os.environ['NPROC']}; unset it")
    overfit_batch(load_params(options.params), _files(options), options.rows, options.steps)


def _files(options: argparse.Namespace) -> "TrainFiles":
    """The project's paths, as in the stage `train`."""
    from sdtrain.training.files import TrainFiles

    root, metrics = Path(os.environ.get("DVC_ROOT", ".")), Path("metrics")
    return TrainFiles(
        base=options.base,
        latents=options.latents,
        checkpoints=Path("data/checkpoints"),
        metrics=metrics / "train.json",
        train_curve=metrics / "train.csv",
        speed_curve=metrics / "train_speed.csv",
        validation_curve=metrics / "validation.csv",
        validation_images=Path("plots/validation"),
        runs=root / "runs",
        states=root / ".dvc" / "tmp" / "resume",
    )

"""What is wrong with a run, from what it recorded."""

import math
from typing import Any

from sdtrain.evaluation.faults import run_faults
from sdtrain.ground.errors import InputError
from sdtrain.tools.compare.recipes import SEED, Origin, leaves, origin_of
from sdtrain.tools.compare.runs import Run


def settings_of(run: Run) -> tuple[dict[str, Any], Origin | None]:
    """All params that a run was made with, by dotted key; and what its metrics follow from, if its dvc.lock tells."""
    written = dict(leaves(run.params))
    try:
        origin, seed = origin_of(run)
    except InputError:
        return written, None
    return written | origin.params | {SEED: seed}, origin


def faults_of(run: Run) -> list[str]:
    """What is wrong with a run, a sentence each.

    Raises:
        InputError: a table has a cell that is no number.
    """
    settings, _ = settings_of(run)
    dropout = settings.get("train.caption_dropout")
    return run_faults(
        {name: number for name, number in run.numbers.items() if math.isfinite(number)},
        run.table("validation.csv", ["step", "loss_raw"]),
        run.table("train.csv", ["step", "lr"]),
        dropout if isinstance(dropout, int | float) else 0.0,
        settings.get("train.resume") == "branch",
    )

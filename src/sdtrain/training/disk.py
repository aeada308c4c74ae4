"""The disk that a training run needs."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import existing
from sdtrain.training.memory import Costs

MAX_STATES = 3
"""Saved states of a run on disk at once: two are kept, and the next is written before the older one is deleted."""


@dataclass(frozen=True)
class DiskNeeds:
    """Peak size of what a run writes."""

    states_bytes: int
    """In the folder of saved states, the best checkpoints so far included."""
    checkpoints_bytes: int
    """In data/checkpoints."""


def disk_needs(costs: Costs, num_best: int) -> DiskNeeds:
    """Disk space of a run of these costs with `num_best` best checkpoints.

    Counted with the states: the best checkpoints, one that only the older state refers to, and one being written.
    There can be more if a run validates more often than it saves.
    """
    states_bytes = MAX_STATES * costs.state_bytes + (num_best + 2) * costs.checkpoint_bytes
    return DiskNeeds(states_bytes, (num_best + 1) * costs.checkpoint_bytes)


def check_disk(costs: Costs, num_best: int, states: Path, out: Path, saved_bytes: int) -> None:
    """Check that saved states and checkpoints will fit on the disk.

    Args:
        saved_bytes: what this run already uses in `states`.

    Raises:
        InputError: names the needed and the free space.
    """
    needed = disk_needs(costs, num_best)
    by_disk: dict[int, int] = {}
    for folder, num_bytes in ((states, needed.states_bytes - saved_bytes), (out, needed.checkpoints_bytes)):
        place = existing(folder)
        device = place.stat().st_dev
        by_disk[device] = by_disk.get(device, 0) + num_bytes
        free = shutil.disk_usage(place).free
        if by_disk[device] > free:
            raise InputError(
                f"{place} has {free / 2**30:.1f} GiB free, saved states and checkpoints need "
                f"{by_disk[device] / 2**30:.1f} GiB; free some space (saved states of other runs are in {states})"
            )

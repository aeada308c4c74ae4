"""Processes that share a stage's work, and leave the same bytes as one process does.

Whole batches are dealt, the same that one process computes, because what is computed of a row depends by rounding on
its batch. Every process gets all results, in order, and takes the same way through the code; the main one alone prints
and writes.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from sdtrain.ground.errors import InputError

_PATIENCE = timedelta(days=1)
"""How long processes wait for a slower one. Of one that died they learn at once."""

T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class Processes:
    """This process among those that share a stage's work."""

    index: int = 0
    num: int = 1

    @property
    def is_main(self) -> bool:
        """Whether it is the one that prints and writes."""
        return self.index == 0

    def map(self, compute: Callable[[T], R], batches: Sequence[T]) -> Iterator[R]:
        """What `compute` gives of each batch, in order and in every process; each computes every `num`-th.

        Results are exchanged after each round of one batch per process, so no more than a round's are held. They are
        pickled: tensors must be on the CPU. All processes must call this with as many batches, and take all results.

        Raises:
            InputError: in the main process, also for another's.
        """
        for first in range(0, len(batches), self.num):
            mine = batches[first : first + self.num][self.index :][:1]
            yield from self._exchange([compute(batch) for batch in mine])

    def _exchange(self, results: list[Any]) -> list[Any]:
        """All processes' results, in order of their indices."""
        if self.num == 1:
            return results
        found = self._gather(results)
        faults = [one for one in found if isinstance(one, _Fault)]
        if faults:
            raise _EndedByAnother(next((fault.message for fault in faults if fault.message), None))
        return [result for one in found for result in one]

    def _gather(self, mine: Any) -> list[Any]:
        import torch.distributed as dist

        found = [None] * self.num
        try:
            dist.all_gather_object(found, mine)
        except RuntimeError as error:  # Gloo's, where a process has gone
            raise _EndedByAnother(
                f"another process of this stage was killed, or can't be reached any more ({error}); if nothing "
                "else says why, memory may have run out: lower NPROC or the batch size"
            ) from None
        return found


ALONE = Processes()
"""One process that shares with no other."""


@dataclass(frozen=True)
class _Fault:
    """What a process that failed sends in the place of results."""

    message: str | None
    """For the main process to print; None if the one that failed prints its own traceback."""


class _EndedByAnother(Exception):
    """Another process failed, and all know of it.

    Args:
        message: for the main process to print.
    """

    def __init__(self, message: str | None) -> None:
        super().__init__(message)
        self.message = message
        _end_undisturbed()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started, from the body's start to its end; `ALONE` if it started no others.

    Each has its own accelerator, where there are some. All but the main one are silent. A body that raises in one
    process ends in all: they are told in the place of its next results. An `InputError` is raised in the main process,
    wherever it arose.

    Raises:
        InputError: as the body does in any process, or a process was killed.
        SystemExit: in the others.
    """
    num = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if num == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", timeout=_PATIENCE)
    processes = Processes(dist.get_rank(), num)
    try:
        with nullcontext() if processes.is_main else _silence():
            yield processes
            processes._exchange([])  # none ends well before all do
    except _EndedByAnother as end:
        if processes.is_main and end.message:
            raise InputError(end.message) from None
        raise SystemExit(1) from None
    except Exception as error:
        _end_undisturbed()
        is_input = isinstance(error, InputError)
        with suppress(_EndedByAnother):
            processes._gather(_Fault(str(error) if is_input else None))
            if is_input and not processes.is_main:
                raise SystemExit(1) from None
        raise
    finally:
        dist.destroy_process_group()


def _end_undisturbed() -> None:
    """Each process cleans up and ends by itself, though torchrun sends SIGTERM to all once the first has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield

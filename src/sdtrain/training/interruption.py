"""Catches SIGINT and SIGTERM, so that a run can finish its step and save."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """The signal that asked a run to stop, agreed on by all of its processes."""

    def __init__(self, num_processes: int) -> None:
        self._signal = 0
        # On the CPU, so that `asked` never waits for the device.
        self._group = dist.new_group(backend="gloo") if num_processes > 1 else None

    def asked(self) -> int:
        """The signal's number, 0 if there is none; the same in every process."""
        if self._group is None:
            return self._signal
        answer = torch.tensor(self._signal)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self._group)
        return int(answer)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context signals are recorded and don't end the process, however many come."""
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if not self._signal:
            os.write(2, f"\n{signal.Signals(number).name}: ends this step, saves, then stops\n".encode())
        self._signal = number

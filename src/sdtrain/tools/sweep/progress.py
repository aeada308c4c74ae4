"""Shows how a sweep's jobs are getting on: a live table on a terminal, else a line per change."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sdtrain.tools.sweep.job import Job

_STYLES = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "bold red", "skipped": "dim green"}


class Progress:
    """What was shown of some jobs.

    Args:
        live: the table's place on the terminal; None prints lines.
    """

    def __init__(self, jobs: list[Job], live: Live | None) -> None:
        self._jobs, self._live = jobs, live
        self._shown = {job.name: job.state for job in jobs}

    def show(self) -> None:
        """Show what has changed."""
        if self._live is not None:
            self._live.update(_table(self._jobs), refresh=True)
            return
        for job in self._jobs:
            details = [job.stage] if job.state == "running" else [_duration(job.seconds), job.note]
            now = " ".join(filter(None, [job.state, *details]))
            if now != self._shown[job.name]:
                self._shown[job.name] = now
                print(f"{job.name}: {now}", flush=True)


@contextmanager
def showing(jobs: list[Job]) -> Iterator[Progress]:
    """Show jobs until the context ends."""
    if not sys.stdout.isatty():
        yield Progress(jobs, None)
        return
    with Live(console=Console(), auto_refresh=False) as live:
        yield Progress(jobs, live)


def counts(jobs: list[Job]) -> str:
    """E.g. `3 done, 1 failed, 2 waiting`."""
    states = Counter(job.state for job in jobs)
    return ", ".join(f"{states[state]} {state}" for state in _STYLES if states[state])


def _table(jobs: list[Job]) -> Table:
    table = Table(box=None, caption=counts(jobs), caption_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("state")
    table.add_column("time", justify="right")
    table.add_column("stage")
    table.add_column("last line of its log", no_wrap=True, overflow="ellipsis", ratio=1)
    for job in jobs:
        state = Text(job.state, style=_STYLES[job.state])
        table.add_row(Text(job.name), state, _duration(job.seconds), job.stage, Text(job.note))
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if seconds else ""

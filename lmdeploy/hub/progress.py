"""Progress of one download: a bar on a terminal, a line per tenth elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from lmdeploy.hub.store import megabytes


class Progress(Protocol):
    """Told how far a download has come."""

    def at(self, done: int) -> None:
        """``done`` bytes are here now; never falls below what was told before."""


class _Silent:
    def at(self, done: int) -> None:
        pass


class _Lines:
    """Writes a line for every tenth of the whole (every 100 MB if the size is unknown)."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total, self.step = title, total, max(total // 10, 1) if total else 100_000_000
        self.next = self.step
        self.done = 0

    def at(self, done: int) -> None:
        self.done = max(self.done, done)
        if self.done >= self.next:
            self.next = (self.done // self.step + 1) * self.step
            of = f' of {megabytes(self.total)}' if self.total else ''
            print(f'{self.title}: {megabytes(self.done)}{of}', file=sys.stderr, flush=True)


class _Bar:
    """A rich progress bar on stderr; refreshed at most ten times a second."""

    def __init__(self, bar, task) -> None:
        self.bar, self.task, self.done, self.shown = bar, task, 0, 0.0

    def at(self, done: int) -> None:
        self.done = max(self.done, done)
        now = time.monotonic()
        if now - self.shown >= 0.1:
            self.shown = now
            self.bar.update(self.task, completed=self.done)


def shifted(progress: Progress, before: int) -> Callable[[int], None]:
    """Tells ``progress`` about a part of the whole, which begins after ``before`` bytes."""
    return lambda count: progress.at(before + count)


@contextlib.contextmanager
def progress_of(title: str, total: int | None, enabled: bool) -> Iterator[Progress]:
    """Show how ``total`` bytes (None: unknown) of ``title`` arrive, on stderr."""
    if not enabled:
        yield _Silent()
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        console = None
    else:
        console = Console(stderr=True)
    if console is None or not console.is_terminal:
        yield _Lines(title, total)
        return
    columns = (TextColumn('{task.description}', markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn())
    with RichProgress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        shown = _Bar(bar, task)
        yield shown
        bar.update(task, completed=total or shown.done)

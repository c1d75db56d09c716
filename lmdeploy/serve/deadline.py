"""Deadline: ends what a task does at a given time, or before, with an error of our choice."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Deadline:
    """``async with Deadline(seconds, error)``: the body is cancelled in time and ``error`` is raised in its place.

    :meth:`expire` does the same at once with another error. A cancellation that comes from elsewhere stays one.
    """

    def __init__(self, seconds: float, error: Exception) -> None:
        self._seconds = seconds
        self._error = error
        self._expired: Exception | None = None
        self._task: asyncio.Task | None = None
        self._timer: asyncio.TimerHandle | None = None

    def expire(self, error: Exception) -> None:
        """End the body now; without a body that runs, nothing happens."""
        if self._task is not None and self._expired is None:
            self._expired = error
            self._task.cancel()

    async def __aenter__(self) -> Deadline:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self.expire, self._error)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
        if self._expired is not None and isinstance(error, asyncio.CancelledError):
            uncancel = getattr(task, 'uncancel', None)  # from Python 3.11 on, cancellations are counted
            if uncancel is not None:
                uncancel()
            raise self._expired from None

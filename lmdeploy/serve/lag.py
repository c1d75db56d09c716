"""LoopLag: how late the event loop runs what is due. Whatever blocks it holds up every stream."""

from __future__ import annotations

import asyncio

INTERVAL = 0.1
WINDOW = 30.0


class LoopLag:
    """Measured by a timer; all values are seconds."""

    def __init__(self) -> None:
        self.last = 0.0
        self._worst, self._before = 0.0, 0.0  # in this window, and in the one before
        self._since = float('-inf')

    @property
    def worst(self) -> float:
        """The largest of the last 30 to 60 seconds."""
        return max(self._worst, self._before)

    def note(self, now: float, lag: float) -> None:
        """A timer came ``lag`` late, at ``now``."""
        if now - self._since > WINDOW:
            self._before, self._worst, self._since = self._worst, 0.0, now
        self.last = lag
        self._worst = max(self._worst, lag)

    async def watch(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + INTERVAL
            await asyncio.sleep(INTERVAL)
            self.note(loop.time(), max(0.0, loop.time() - due))

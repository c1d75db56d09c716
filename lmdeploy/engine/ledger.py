"""Ledger: the counters of an engine that was started several times, as those of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lmdeploy.engine.metrics import EngineStats
from lmdeploy.engine.wire import STATS, WireError

GAUGES = frozenset({'waiting', 'running', 'total_blocks', 'used_blocks', 'cached_blocks', 'in_flight'})
_COUNTERS = tuple(i for i, name in enumerate(STATS) if name not in GAUGES)
_STEPS = STATS.index('steps')


class Ledger:
    """Adds up what ended engines had counted and what the present one counts.

    ``accepted == finished + failed + cancelled + in_flight`` holds over crashes too: requests that ended with their
    engine are counted as failed.
    """

    def __init__(self) -> None:
        self._before = EngineStats(*[0] * len(STATS))
        self._last: Sequence[int] = [0] * len(STATS)

    def update(self, values: Sequence[int]) -> None:
        """The present engine's numbers, in the order of :data:`lmdeploy.engine.wire.STATS`.

        Raises:
            WireError: they are too few or too many.
        """
        if len(values) != len(STATS):
            raise WireError(f'{len(values)} numbers where {len(STATS)} belong')
        self._last = values

    def ended(self, *, refused: bool) -> None:
        """A request ended on its way to the engine."""
        before = self._before
        if refused:
            self._before = replace(before, rejected=before.rejected + 1)
        else:
            self._before = replace(before, accepted=before.accepted + 1, cancelled=before.cancelled + 1)

    def crashed(self, requests: int, *, cancelled: bool = False) -> None:
        """The present engine is no more; ``requests`` had not ended, and failed with it (or were cancelled)."""
        now = self.stats()
        lost = max(requests, now.in_flight)
        blank = dict.fromkeys(GAUGES, 0)
        accepted = now.accepted - now.in_flight + lost
        failed, aborted = (now.failed, now.cancelled + lost) if cancelled else (now.failed + lost, now.cancelled)
        self._before = replace(now, accepted=accepted, failed=failed, cancelled=aborted, **blank)
        self._last = [0] * len(STATS)

    @property
    def steps(self) -> int:
        """Steps of the present engine."""
        return self._last[_STEPS]

    def stats(self) -> EngineStats:
        """The numbers of now."""
        values = list(self._last)
        for i in _COUNTERS:
            values[i] += getattr(self._before, STATS[i])
        return EngineStats(*values)

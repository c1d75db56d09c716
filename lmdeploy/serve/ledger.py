"""Ledger: what became of the requests that were taken on, so that none is ever lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from lmdeploy.serve.lag import LoopLag

Outcome = Literal['finished', 'failed', 'cancelled']


@dataclass(slots=True)
class Ledger:
    """Counts of the event loop's thread only, so that at every moment accepted requests are finished, failed, cancelled
    or in flight; what is turned away before it is accepted is rejected."""

    accepted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    in_flight: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # by code of the error
    responses: Counter[int] = field(default_factory=Counter)  # by HTTP status
    unknown_fields: int = 0
    lag: LoopLag = field(default_factory=LoopLag)

    def accept(self) -> None:
        self.accepted += 1
        self.in_flight += 1

    def end(self, outcome: Outcome) -> None:
        """A request that was accepted is over."""
        self.in_flight -= 1
        setattr(self, outcome, getattr(self, outcome) + 1)

    def check(self) -> None:
        """Assert that no request is lost."""
        assert self.accepted == self.finished + self.failed + self.cancelled + self.in_flight

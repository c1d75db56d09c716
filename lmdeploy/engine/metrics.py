"""Counters of the engine and the snapshot that is shown of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Everything that ever happened; only the engine's own thread writes."""

    accepted: int = 0
    rejected: int = 0  # refused before they were accepted
    finished: int = 0  # ended by a stop id or by length
    failed: int = 0
    cancelled: int = 0
    steps: int = 0
    prompt_tokens: int = 0  # of accepted requests
    output_tokens: int = 0
    computed_tokens: int = 0  # query tokens of all launched rows
    prefix_query_tokens: int = 0  # of prompts that were looked up in the prefix index
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    non_finite: int = 0  # requests that ended because their logits were not finite

    def end(self, reason: str) -> None:
        """A request ended with this finish reason."""
        if reason == 'abort':
            self.cancelled += 1
        elif reason == 'error':
            self.failed += 1
        else:
            self.finished += 1


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One consistent moment between two steps: ``accepted == finished + failed + cancelled + in_flight`` always."""

    waiting: int
    running: int
    total_blocks: int
    used_blocks: int
    cached_blocks: int
    accepted: int
    rejected: int
    finished: int
    failed: int
    cancelled: int
    in_flight: int
    steps: int
    prompt_tokens: int
    output_tokens: int
    computed_tokens: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    non_finite: int

    @property
    def free_blocks(self) -> int:
        """Blocks that a request can get, cached ones included."""
        return self.total_blocks - self.used_blocks

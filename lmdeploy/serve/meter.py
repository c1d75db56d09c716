"""The line about the last seconds, which a server prints from time to time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmdeploy.serve.context import ServerContext

Meter = Callable[[float], str]
"""Called with the seconds since it was made or called last: what has happened in them; empty: nothing."""


class EngineMeter:
    """The :data:`Meter` of a server with an engine."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._counts = self._count()
        self._tokens = self._count_tokens()

    def __call__(self, seconds: float) -> str:
        context, metrics, engine = self._context, self._context.metrics, self._context.stats()
        (prompt, output), counts = self._tokens, self._count()
        self._tokens = self._count_tokens()
        if engine is None or (counts == self._counts and not metrics.in_flight and not engine.running):
            return ''
        self._counts = counts
        looked_up = max(engine.prefix_query_tokens, 1)
        return (f'running {engine.running}, waiting {engine.waiting + context.admission.queued}, '
                f'prompt {max(engine.prompt_tokens - prompt, 0) / seconds:.1f} tokens/s, '
                f'generation {max(engine.output_tokens - output, 0) / seconds:.1f} tokens/s, '
                f'KV cache {100 * engine.used_blocks / max(engine.total_blocks, 1):.1f}%, '
                f'prefix cache hits {100 * engine.prefix_hit_tokens / looked_up:.1f}%, '
                f'finished {metrics.finished}, failed {metrics.failed}, cancelled {metrics.cancelled}')

    def _count(self) -> tuple[int, int, int]:
        metrics = self._context.metrics
        return metrics.generation_tokens, metrics.prompt_tokens, metrics.accepted

    def _count_tokens(self) -> tuple[int, int]:
        engine = self._context.stats()
        return (0, 0) if engine is None else (engine.prompt_tokens, engine.output_tokens)

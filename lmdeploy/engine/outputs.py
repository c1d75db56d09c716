"""Which rows of a step's logits, hidden states and log-probabilities belong to a request's answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmdeploy.engine.plan import Logprobs
from lmdeploy.engine.request import Request
from lmdeploy.engine.sampling import Rows


def cut_logprobs(logprobs: Logprobs | None, count: int) -> Logprobs | None:
    """The first ``count`` tokens' (those after a stop id are not part of the answer); None if there are none."""
    if logprobs is None or not count:
        return None
    if len(logprobs.chosen) == count:
        return logprobs
    return Logprobs(logprobs.chosen[:count], logprobs.ids[:count], logprobs.values[:count])


def take_rows(request: Request, start: int, drawn: int, new: int) -> Callable[[Any, Rows], Any]:
    """A cutter for the outputs of one retired row that began at position ``start`` and accepted ``new`` tokens.

    ``drawn`` positions at the row's end were drawn from (1 and its drafts, or 0). Rows that were handed out before a
    preemption are not handed out again.
    """
    first = max(request.rows_out, start)
    last = min(request.settled, max(request.prompt_len, len(request.tokens) - 1))
    if request.all_rows:
        request.rows_out = max(request.rows_out, last)

    def cut(values: Any, wanted: Rows) -> Any:
        if values is None or wanted is None:
            return None
        if wanted == 'all':
            return values[first - start:last - start] if last > first else None
        return values[len(values) - drawn:][:new] if new else None

    return cut

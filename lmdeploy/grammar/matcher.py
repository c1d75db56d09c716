"""Matcher: one answer's place in a grammar, in the form that the engine asks for."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmdeploy.grammar.automata import first_line, is_panic
from lmdeploy.grammar.formats import Source
from lmdeploy.log import get_logger


class Matcher:
    """Implements :class:`lmdeploy.engine.request.Grammar`; raises nothing in the engine.

    Where the grammar may end, all the request's stop tokens are allowed; where it is complete, nothing else is. After
    a failure of the automaton (its limits hold at every step) no token is allowed, which ends the request with an
    error: it never goes on unconstrained.

    Args:
        source: the grammar; with ``stop_ids`` all that another process needs to build the same matcher.
        automaton: an ``LLMatcher`` of its own.
        end_id: the token by which the automaton says that the grammar may end.
        stop_ids: the tokens that end the answer.
        first_ban: ``[ceil(vocab / 32)] uint32``, tokens that must not be the first of the answer; None: there are none.
    """

    __slots__ = ('source', 'stop_ids', '_automaton', '_end', '_stops', '_first_ban', '_failed')

    def __init__(self, source: Source, automaton: Any, *, end_id: int, stop_ids: tuple[int, ...],
                 first_ban: np.ndarray | None = None) -> None:
        self.source = source
        self.stop_ids = stop_ids
        self._automaton = automaton
        self._end = (end_id >> 5, np.uint32(1 << (end_id & 31)))
        self._stops = [(token >> 5, np.uint32(1 << (token & 31))) for token in stop_ids]
        self._first_ban = first_ban
        self._failed = False

    def fill(self, mask: np.ndarray) -> None:
        """Write the allowed tokens into ``mask``, ``[ceil(vocab / 32)] uint32``, bit set = allowed."""
        if not self._failed:
            self._run(lambda: self._automaton.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes))
        if self._failed:
            mask.fill(0)
            return
        word, bit = self._end
        if mask[word] & bit:
            mask[word] &= ~bit
            for word, bit in self._stops:
                mask[word] |= bit
        if self._first_ban is not None:
            mask &= ~self._first_ban

    def accept(self, token: int) -> None:
        """``token``, no stop token, was generated."""
        self._first_ban = None
        if not self._failed:
            self._run(lambda: self._automaton.consume_token(token))

    def _run(self, call: Any) -> None:
        """Let the automaton work and note its failure."""
        try:
            call()
            if not self._automaton.is_error():
                return
            reason = self._automaton.get_error()
        except BaseException as error:  # a panic of the library is no Exception
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            reason = f'{type(error).__name__}: {error}'
        self._failed = True
        get_logger().warning('the grammar of a request failed: %s', first_line(reason))

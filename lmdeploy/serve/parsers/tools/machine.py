"""What all tool parsers share: a state is a method that reads some characters and may name the next state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from lmdeploy.serve.parsers.base import Event, Writer, new_call_id

State = Callable[[str, int], int]
"""``(text, pos) -> position behind what was read``; a state that reads nothing has changed the state."""


class CallMachine(ABC):
    """Base of the tool parsers (:class:`lmdeploy.serve.parsers.base.ToolParser`).

    Args:
        new_id: makes the ids of calls.
    """

    def __init__(self, new_id: Callable[[], str] = new_call_id) -> None:
        self._out = Writer(new_id)
        self._state: State = self._begin

    def push(self, text: str) -> list[Event]:
        pos = 0
        while pos < len(text):
            pos = self._state(text, pos)
        return self._out.take()

    def flush(self) -> list[Event]:
        self._finish()
        return self._out.take()

    @abstractmethod
    def _begin(self, text: str, pos: int) -> int:
        """The first state."""

    @abstractmethod
    def _finish(self) -> None:
        """Decide what is held, at the end of the text."""

    def _content(self, text: str, pos: int) -> int:
        """A state that is never left: everything is content."""
        self._out.content(text[pos:])
        return len(text)

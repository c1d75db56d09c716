"""What the parsers say (events), and the writer that all tool parsers put it together with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol
from uuid import uuid4

SPACE = ' \t\r\n'
"""What JSON calls whitespace; the only characters that the parsers ever skip."""
MAX_SPACE = 64
"""A longer run of whitespace is no decoration of a call but content."""


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the reasoning in front of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Frame:
    """Characters of the format: markers, keys, names, whitespace around calls. Not shown to anybody."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins.

    Attributes:
        index: 0, 1, ... within the answer.
        id: unique over all answers.
        name: the function's.
        arguments: ``'{}'`` for a call without any; else empty, and :class:`CallArguments` follow.
    """

    index: int
    id: str
    name: str
    arguments: str = ''


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments: JSON text, exactly as the model wrote it."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is over; ``complete`` says whether its arguments are a whole JSON object."""

    index: int
    complete: bool


Event = Content | Reasoning | Frame | CallStart | CallArguments | CallEnd


class Split(NamedTuple):
    """What a piece of an answer adds to either side."""

    reasoning: str
    content: str


class ReasoningParser(Protocol):
    """Parts reasoning from content. One object serves one answer."""

    def push(self, text: str) -> Split:
        """The next piece of the answer."""

    def flush(self) -> Split:
        """The answer is over: what was held back until now."""


class ToolParser(Protocol):
    """Finds tool calls. One object serves one answer.

    Its events, in their order, hold every character of the answer exactly once (in ``Content``, ``Frame`` and
    ``CallArguments``).
    """

    def push(self, text: str) -> list[Event]:
        """The next piece of the answer."""

    def flush(self) -> list[Event]:
        """The answer is over: what was held back until now."""


def new_call_id() -> str:
    """An id for a call."""
    return f'chatcmpl-tool-{uuid4().hex}'


class Writer:
    """Collects the events of a tool parser.

    Text whose meaning is not decided yet is *held*. It becomes content, or frame, or, when :meth:`start` turns it
    into a call, the frame and arguments that it was held as; after that, frame and arguments of the call pass through
    directly.

    Args:
        new_id: makes the ids of calls.
    """

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._events: list[Event] = []
        self._held: list[tuple[str, bool]] = []  # text, whether it belongs to the arguments
        self._calls = 0
        self.started = False  # the current call is announced

    def take(self) -> list[Event]:
        """The events since the last time, with neighbours of one kind joined."""
        events, self._events = self._events, []
        joined: list[Event] = []
        parts: list[str] = []
        for event in events:
            if isinstance(event, (CallStart, CallEnd, Reasoning)):
                _close(joined, parts)
                joined.append(event)
                continue
            if not joined or type(joined[-1]) is not type(event):
                _close(joined, parts)
                joined.append(event)
            parts.append(event.text)
        _close(joined, parts)
        return joined

    def content(self, text: str) -> None:
        """Text for the reader, behind everything held, which is content then too."""
        self.release()
        if text:
            self._events.append(Content(text))

    def hold(self, text: str) -> None:
        if text:
            self._held.append((text, False))

    def release(self, frame: bool = False) -> None:
        """What is held is content, or frame."""
        kind = Frame if frame else Content
        self._events += [kind(text) for text, _ in self._held]
        self._held.clear()

    # Inside a call.

    def part(self, text: str, arguments: bool = False) -> None:
        """Text of the current call."""
        if not text:
            return
        if not self.started:
            self._held.append((text, arguments))
        else:
            self._events.append(CallArguments(self._calls, text) if arguments else Frame(text))

    def start(self, name: str, empty: bool = False) -> None:
        """The call is certain; ``empty``: it has no arguments. It begins in front of arguments that are held."""
        start = next((i for i, (_, arguments) in enumerate(self._held) if arguments), len(self._held))
        held, self._held = self._held, []
        self.started = True
        for text, _ in held[:start]:
            self.part(text)
        self._events.append(CallStart(self._calls, self._new_id(), name, '{}' if empty else ''))
        for text, arguments in held[start:]:
            self.part(text, arguments)

    def end(self, complete: bool) -> None:
        """The call is over; one that has not started never was, and what is held of it is content."""
        if not self.started:
            self.release()
            return
        self._events.append(CallEnd(self._calls, complete))
        self._calls += 1
        self.started = False


def _close(joined: list[Event], parts: list[str]) -> None:
    """Put the joined text into the last event."""
    if not parts:
        return
    last = joined[-1]
    assert not isinstance(last, (CallStart, CallEnd))
    joined[-1] = replace(last, text=''.join(parts))
    parts.clear()

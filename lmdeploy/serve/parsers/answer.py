"""A whole answer: reasoning, content and calls, for clients that read along and for those that wait."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lmdeploy.serve.parsers.base import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Frame,
    Reasoning,
    ReasoningParser,
    Split,
    ToolParser,
)


class AnswerParser:
    """Reads one answer: the reasoning first, then the calls in what is left.

    An answer that does not come in pieces is one :meth:`push` and a :meth:`flush`, and gives the same.

    Args:
        reasoning: parts the reasoning from the rest; None: there is none.
        tools: finds the calls; None: there are none.
        most_calls: further calls are left out; None: any number.
    """

    def __init__(self, reasoning: ReasoningParser | None = None, tools: ToolParser | None = None,
                 most_calls: int | None = None) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._most_calls = most_calls
        self.calls = 0
        """How many calls have begun."""

    def push(self, text: str) -> list[Event]:
        """What the next piece of the answer tells (no ``Frame``)."""
        split = Split('', text) if self._reasoning is None else self._reasoning.push(text)
        return self._events(split, last=False)

    def read(self, text: str, last: bool) -> list[Event]:
        """What the next piece tells, and if it is the last one, what was held back."""
        return (self.push(text) if text else []) + (self.flush() if last else [])

    def flush(self) -> list[Event]:
        """The answer is over, wherever it stands: what was held back."""
        split = Split('', '') if self._reasoning is None else self._reasoning.flush()
        return self._events(split, last=True)

    def _events(self, split: Split, last: bool) -> list[Event]:
        events: list[Event] = [Reasoning(split.reasoning)] if split.reasoning else []
        if self._tools is None:
            return [*events, Content(split.content)] if split.content else events
        found = self._tools.push(split.content) if split.content else []
        events += filter(self._wanted, (*found, *(self._tools.flush() if last else ())))
        self.calls += sum(isinstance(event, CallStart) for event in events)
        return events

    def _wanted(self, event: Event) -> bool:
        if isinstance(event, (CallStart, CallArguments, CallEnd)):
            return self._most_calls is None or event.index < self._most_calls
        return not isinstance(event, Frame)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call.

    Attributes:
        id: unique over all answers.
        name: the function's.
        arguments: JSON text, as the model wrote it.
        complete: whether that is a whole JSON object; False: the answer broke off inside it, or left JSON there.
    """

    id: str
    name: str
    arguments: str
    complete: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as a whole; None where there is nothing."""

    reasoning: str | None
    content: str | None
    calls: tuple[ToolCall, ...]


def collect(events: Iterable[Event]) -> Answer:
    """Put the events of a whole answer together."""
    reasoning: list[str] = []
    content: list[str] = []
    starts: list[CallStart] = []
    arguments: list[list[str]] = []
    complete: list[bool] = []
    for event in events:
        if isinstance(event, Reasoning):
            reasoning.append(event.text)
        elif isinstance(event, Content):
            content.append(event.text)
        elif isinstance(event, CallStart):
            starts.append(event)
            arguments.append([event.arguments])
            complete.append(False)
        elif isinstance(event, CallArguments):
            arguments[event.index].append(event.text)
        elif isinstance(event, CallEnd):
            complete[event.index] = event.complete
    calls = tuple(ToolCall(start.id, start.name, ''.join(parts), whole)
                  for start, parts, whole in zip(starts, arguments, complete))
    return Answer(''.join(reasoning) or None, ''.join(content) or None, calls)

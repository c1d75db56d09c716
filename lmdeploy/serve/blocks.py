"""An answer as a row of blocks: what it thinks, what it says, what it calls, each begun, continued and ended.

Anthropic's messages and OpenAI's responses both tell an answer this way. A stream tells each step as it comes, a whole
answer is the blocks at its end; so the two agree by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from lmdeploy.frontend.frontend import RequestOutput
from lmdeploy.messages import FinishReason
from lmdeploy.serve.generation import Usage
from lmdeploy.serve.parsers import AnswerParser, CallArguments, CallEnd, CallStart, Content, Event, Reasoning

Kind = Literal['reasoning', 'text', 'call']


@dataclass(slots=True, eq=False)
class Block:
    """One block of an answer.

    Attributes:
        index: its place in the answer, from 0.
        id: of a call, as its result will name it; of other blocks an id of their own.
        name: of a called function.
        pieces: together the text, or the arguments of the call as JSON text.
        complete: whether it came to its end. A call whose arguments are no whole JSON object did not, and neither did
            what went on when the answer was cut off.
    """

    index: int
    kind: Kind
    id: str
    name: str = ''
    pieces: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def text(self) -> str:
        return ''.join(self.pieces)


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to a block: it begins, its text grows, it ends.

    Attributes:
        text: what is new; empty unless it grows.
    """

    kind: Literal['begin', 'grow', 'end']
    block: Block
    text: str = ''


class Blocks:
    """Puts the events of one answer into blocks.

    Args:
        new_id: makes the id of a block of this kind.
    """

    def __init__(self, new_id: Callable[[Kind], str]) -> None:
        self.all: list[Block] = []
        self.calls = 0
        self._new_id = new_id
        self._open: Block | None = None

    def take(self, events: Iterable[Event]) -> list[Step]:
        """What the next events do."""
        steps: list[Step] = []
        for event in events:
            if isinstance(event, (Content, Reasoning)):
                kind: Kind = 'text' if isinstance(event, Content) else 'reasoning'
                if self._open is None or self._open.kind != kind:
                    self._begin(steps, kind)
                self._grow(steps, event.text)
            elif isinstance(event, (CallStart, CallArguments, CallEnd)):
                self._call(steps, event)
        return steps

    def finish(self, cut: bool) -> list[Step]:
        """The answer is over. One that has nothing at all is an empty text, so that there is one to read.

        Args:
            cut: it was cut off.
        """
        steps: list[Step] = []
        if not self.all:
            self._begin(steps, 'text')
        self._end(steps, complete=not cut)
        return steps

    def _call(self, steps: list[Step], event: CallStart | CallArguments | CallEnd) -> None:
        if isinstance(event, CallStart):
            self._begin(steps, 'call', event.name)
            self.calls += 1
            self._grow(steps, event.arguments)
        elif isinstance(event, CallArguments):
            self._grow(steps, event.text)
        elif self._open is not None:
            self._end(steps, complete=event.complete)

    def _begin(self, steps: list[Step], kind: Kind, name: str = '') -> None:
        self._end(steps)
        self._open = Block(len(self.all), kind, self._new_id(kind), name)
        self.all.append(self._open)
        steps.append(Step('begin', self._open))

    def _grow(self, steps: list[Step], text: str) -> None:
        assert self._open is not None
        if text:
            self._open.pieces.append(text)
            steps.append(Step('grow', self._open, text))

    def _end(self, steps: list[Step], complete: bool = True) -> None:
        if self._open is not None:
            self._open.complete = complete
            steps.append(Step('end', self._open))
            self._open = None


def events_of(output: RequestOutput, parser: AnswerParser | None, usage: Usage) -> list[Event]:
    """What an output tells. Tokens of reasoning are counted in ``usage``.

    Args:
        parser: None: the answer is all text.
    """
    if parser is None:
        return [Content(output.text)] if output.text else []
    events = parser.read(output.text, last=output.finish_reason is not None)
    if events and isinstance(events[0], Reasoning):
        usage.reasoning += len(output.token_ids)
    return events


@dataclass(slots=True)
class BlockReader:
    """Reads one answer, from its outputs to its blocks.

    Attributes:
        parser: None: the answer is all text.
        finish: why the answer ended, once it has.
        stop_text: the stop text that ended it, if one did.
    """

    parser: AnswerParser | None
    blocks: Blocks
    finish: FinishReason | None = None
    stop_text: str | None = None

    def take(self, output: RequestOutput, usage: Usage) -> list[Step]:
        """What an output does; see :func:`events_of`."""
        steps = self.blocks.take(events_of(output, self.parser, usage))
        if output.finish_reason is not None:
            self.finish, self.stop_text = output.finish_reason, output.stop_text
            steps += self.blocks.finish(cut=output.finish_reason != 'stop')
        return steps

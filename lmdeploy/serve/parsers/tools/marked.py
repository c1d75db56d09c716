"""Calls between markers, inside an answer that may say something else as well."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar

from lmdeploy.serve.parsers.base import MAX_SPACE, SPACE, new_call_id
from lmdeploy.serve.parsers.markers import MarkerScanner, skip_space
from lmdeploy.serve.parsers.tools.call import MAX_NAME, ArgumentsObject, CallObject, usable_name
from lmdeploy.serve.parsers.tools.machine import CallMachine, State


@dataclass(frozen=True, slots=True)
class Form:
    """How a call is marked.

    Attributes:
        opening: the markers in front of it; whitespace may stand between two.
        closing: the marker behind it; it may be missing, because the last token of an answer is not part of its text.
        named: ``NAME>`` and the arguments follow, not a call as a JSON object.
        strict: nothing but its shape tells the call from other JSON, so it must call a function that is offered.
    """

    opening: tuple[str, ...]
    closing: str = ''
    named: bool = False
    strict: bool = False


BARE = Form((), strict=True)
FENCE = '```'
FENCED = Form((FENCE + 'json',), FENCE, strict=True)


class MarkedTools(CallMachine):
    """Finds the calls of :attr:`forms`; a subclass is a format.

    Whitespace in front of a call, and behind the last one, belongs to the calls.

    Args:
        new_id: makes the ids of calls.
        names: the functions that the request offers; None: not known. A marked call of another one is a call all the
            same, and the client's to refuse; a call without markers is then text.
    """

    forms: ClassVar[tuple[Form, ...]]
    bare: ClassVar[bool] = False
    """A call may begin an answer without any marker, or in a block of JSON code."""
    chained: ClassVar[bool] = False
    """Behind a call as a JSON object another one may follow without a marker, or behind ``;``."""

    def __init__(self, new_id: Callable[[], str] = new_call_id, names: Collection[str] | None = None) -> None:
        super().__init__(new_id)
        self._names = names
        self._openings = {form.opening[0]: form for form in self.forms}
        self._scanner = MarkerScanner(*self._openings)
        self._form = BARE  # of the latest call
        self._due: list[str] = []  # further markers of the opening, the next one last
        self._rest = ''  # of the marker that must follow
        self._gap = 0  # length of the whitespace in front of what must follow
        self._name: list[str] = []
        self._object: CallObject | ArgumentsObject | None = None
        self._behind_call = False  # nothing but whitespace since the latest call

    # In the text.

    def _begin(self, text: str, pos: int) -> int:
        """In front of the first character of an answer."""
        stop = skip_space(text, pos)
        self._scanner.space(text[pos:stop])
        if stop < len(text):
            self._state = self._text
            if self.bare and text[stop] == '{':
                self._enter_object()
            elif self.bare and text[stop] == FENCE[0]:
                self._hold_rest()
                self._form = FENCED
                self._expect(FENCED.opening[0], self._in_marker)
        return stop

    def _text(self, text: str, pos: int) -> int:
        pos = self._scanner.feed(text, pos)
        self._pass_text()
        if self._scanner.found:
            self._marker(self._scanner.found)
        return pos

    def _pass_text(self) -> None:
        text = self._scanner.take_text()
        if text:
            self._out.content(text)
            self._leave_call()

    def _leave_call(self) -> None:
        self._behind_call = False
        self._scanner.markers = tuple(self._openings)

    def _behind(self, text: str, pos: int) -> int:
        """Right behind a call that is a JSON object."""
        stop = skip_space(text, pos)
        self._scanner.space(text[pos:stop])
        if stop < len(text):
            self._state = self._text
            if text[stop] == FENCE[0] and self._form is FENCED:
                self._hold_rest()
                self._expect(FENCE, self._in_fence)
            elif text[stop] == '{' and self.chained:
                self._enter_object()
            elif text[stop] == ';' and self.chained:
                self._hold_rest()
                self._out.hold(';')
                self._gap = 0
                self._state = self._next_object
                return stop + 1
        return stop

    def _hold_rest(self) -> None:
        """What the scanner has kept waits for what follows."""
        self._pass_text()
        for part in self._scanner.take_rest():
            self._out.hold(part)

    def _marker(self, marker: str) -> None:
        self._hold_rest()
        if marker not in self._openings:  # the closing one, if it does stand behind a call
            self._out.release(frame=self._behind_call)
            self._scanner.markers = tuple(self._openings)
            return
        self._leave_call()
        self._form = self._openings[marker]
        self._due = list(self._form.opening[:0:-1])
        self._after_marker()

    def _after_marker(self) -> None:
        self._gap = 0
        if self._due:
            self._expect(self._due.pop(), self._next_marker)
        elif self._form.named:
            self._name = []
            self._state = self._function
        else:
            self._state = self._next_object

    def _expect(self, marker: str, state: State) -> None:
        self._rest = marker
        self._state = state

    # Between the markers and the call: what is read is held.

    def _read_gap(self, text: str, pos: int) -> int:
        """Whitespace, of a limited length; the state stays where it is."""
        stop = min(skip_space(text, pos), pos + MAX_SPACE - self._gap)
        self._gap += stop - pos
        self._out.hold(text[pos:stop])
        return stop if stop > pos else self._give_up(pos)

    def _give_up(self, pos: int) -> int:
        """It is no call: all of it is content."""
        self._out.release()
        self._leave_call()
        self._state = self._text
        return pos

    def _next_marker(self, text: str, pos: int) -> int:
        """In front of the next marker of an opening."""
        if text[pos] in SPACE:
            return self._read_gap(text, pos)
        self._state = self._in_marker
        return pos

    def _in_marker(self, text: str, pos: int) -> int:
        pos = self._match(text, pos)
        if not self._rest:
            self._after_marker()
        return pos

    def _in_fence(self, text: str, pos: int) -> int:
        """In the end of a code block."""
        pos = self._match(text, pos)
        if not self._rest:
            self._out.release(frame=True)
            self._state = self._text
        return pos

    def _match(self, text: str, pos: int) -> int:
        """One character of the marker that is due."""
        if text[pos] != self._rest[0]:
            return self._give_up(pos)
        self._out.hold(text[pos])
        self._rest = self._rest[1:]
        return pos + 1

    def _function(self, text: str, pos: int) -> int:
        """In the name of a function, up to ``>``."""
        char = text[pos]
        if char == '>' and usable_name(''.join(self._name)):
            self._out.hold(char)
            self._state = self._next_object
            return pos + 1
        if char in '<>{"' or char in SPACE or len(self._name) == MAX_NAME:
            return self._give_up(pos)
        self._name.append(char)
        self._out.hold(char)
        return pos + 1

    def _next_object(self, text: str, pos: int) -> int:
        if text[pos] in SPACE:
            return self._read_gap(text, pos)
        if text[pos] != '{':
            return self._give_up(pos)
        if self._form.named:
            self._out.start(''.join(self._name))
            self._object = ArgumentsObject(self._out)
            self._state = self._in_object
        else:
            self._enter_object()
        return pos

    # In the call.

    def _enter_object(self) -> None:
        self._hold_rest()
        strict = self._form.strict
        self._object = CallObject(self._out, bare=strict, names=self._names if strict else None)
        self._state = self._in_object

    def _in_object(self, text: str, pos: int) -> int:
        assert self._object is not None
        pos = self._object.feed(text, pos)
        if self._object.done or self._object.failed:
            self._end_call()
        return pos

    def _end_call(self) -> None:
        assert self._object is not None
        called, complete = self._out.started, _complete(self._object)
        self._out.end(complete)
        self._leave_call()
        self._state = self._text
        if called and complete:
            self._behind_call = True
            if self._form in self.forms and self._form.closing:
                self._scanner.markers += (self._form.closing,)
            if isinstance(self._object, CallObject) and self._object.done:
                self._state = self._behind
        self._object = None

    def _finish(self) -> None:
        if self._object is not None:
            self._out.end(_complete(self._object))
            return
        self._pass_text()
        space, partial = self._scanner.take_rest()
        self._out.hold(space)
        self._out.release(frame=self._behind_call and not partial)
        self._out.content(partial)


def _complete(called: CallObject | ArgumentsObject) -> bool:
    return called.complete if isinstance(called, CallObject) else called.done


class QwenTools(MarkedTools):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``; small and coder models often leave the tags out."""

    forms = (Form(('<tool_call>',), '</tool_call>'),)
    bare = True
    chained = True


class InternLMTools(MarkedTools):
    """``<|action_start|><|plugin|>{"name": ..., "parameters": {...}}<|action_end|>``."""

    forms = (Form(('<|action_start|>', '<|plugin|>'), '<|action_end|>'),)


class Llama3Tools(MarkedTools):
    """The forms of Llama 3: a call behind ``<|python_tag|>``, the tag of a function, or nothing but the call."""

    forms = (Form(('<|python_tag|>',)), Form(('<function=',), '</function>', named=True))
    bare = True
    chained = True

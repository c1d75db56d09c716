"""Answers that a grammar has forced to be calls."""

from __future__ import annotations

from collections.abc import Callable

from lmdeploy.serve.parsers.base import SPACE, new_call_id
from lmdeploy.serve.parsers.markers import skip_space
from lmdeploy.serve.parsers.tools.call import ArgumentsObject, CallObject
from lmdeploy.serve.parsers.tools.machine import CallMachine


class RequiredCalls(CallMachine):
    """``[{"name": ..., "arguments": {...}}, ...]``, or one call without the brackets."""

    _object: CallObject | None = None
    _called = False  # there was a call, and nothing else
    _listed = False

    def _begin(self, text: str, pos: int) -> int:
        if text[pos] == '[':
            self._listed = True
            self._state = self._item
            self._out.hold('[')
            return pos + 1
        return self._item(text, pos)

    def _item(self, text: str, pos: int) -> int:
        """In front of a call."""
        if text[pos] == '{':
            self._object = CallObject(self._out)
            self._state = self._in_object
            return pos
        if text[pos] == ']' and self._listed:
            return self._last(text, pos)
        return self._space(text, pos)

    def _in_object(self, text: str, pos: int) -> int:
        assert self._object is not None
        pos = self._object.feed(text, pos)
        if self._object.done or self._object.failed:
            self._called = self._out.started
            self._out.end(self._object.complete)
            self._state = self._behind if self._object.done else self._content
            self._object = None
        return pos

    def _behind(self, text: str, pos: int) -> int:
        """Behind a call."""
        if text[pos] == ',' and self._listed:
            self._out.hold(',')
            self._state = self._item
            return pos + 1
        if text[pos] == ']' and self._listed:
            return self._last(text, pos)
        return self._space(text, pos)

    def _last(self, text: str, pos: int) -> int:
        self._out.hold(text[pos])
        self._state = self._space
        return pos + 1

    def _space(self, text: str, pos: int) -> int:
        """Whitespace; anything else makes the rest content."""
        stop = skip_space(text, pos)
        self._out.hold(text[pos:stop])
        if stop < len(text) and stop == pos:
            self._state = self._content
        return stop

    def _finish(self) -> None:
        if self._object is not None:
            self._out.end(self._object.complete)
        else:
            self._out.release(frame=self._called)


class NamedCall(CallMachine):
    """``{...}``: the arguments of a function that the request names.

    Args:
        name: the function's.
        new_id: makes the ids of calls.
    """

    def __init__(self, name: str, new_id: Callable[[], str] = new_call_id) -> None:
        super().__init__(new_id)
        self._name = name
        self._object: ArgumentsObject | None = None
        self._called = False

    def _begin(self, text: str, pos: int) -> int:
        if text[pos] in SPACE:
            stop = skip_space(text, pos)
            self._out.hold(text[pos:stop])
            return stop
        if text[pos] == '{':
            self._out.start(self._name)
            self._object = ArgumentsObject(self._out)
            self._state = self._in_object
        else:
            self._state = self._content
        return pos

    def _in_object(self, text: str, pos: int) -> int:
        assert self._object is not None
        pos = self._object.feed(text, pos)
        if self._object.done or self._object.failed:
            self._called = self._object.done
            self._out.end(self._object.done)
            self._state = self._behind if self._object.done else self._content
            self._object = None
        return pos

    def _behind(self, text: str, pos: int) -> int:
        """Behind the call, nothing but whitespace is expected."""
        stop = skip_space(text, pos)
        self._out.hold(text[pos:stop])
        if stop < len(text):
            self._state = self._content
        return stop

    def _finish(self) -> None:
        if self._object is not None:
            self._out.end(False)
        else:
            self._out.release(frame=self._called)

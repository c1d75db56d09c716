"""One call as a JSON object, read as it comes."""

from __future__ import annotations

import json
from collections.abc import Collection

from lmdeploy.serve.parsers.base import SPACE, Writer
from lmdeploy.serve.parsers.json_stream import JsonScanner
from lmdeploy.serve.parsers.markers import skip_space
from lmdeploy.serve.parsers.tools.machine import State

MAX_ARGUMENTS = 256 * 1024
"""Characters of one call's arguments."""
MAX_ENVELOPE = 16 * 1024
"""Characters of a call outside its arguments."""
MAX_NAME = 256
"""Characters of a function's name."""

NAME, ARGUMENTS = 'name', 'arguments'
KEYS = {'name': NAME, 'arguments': ARGUMENTS, 'parameters': ARGUMENTS}
PLAIN_KEYS = {'id', 'type'}


def usable_name(name: str) -> bool:
    """Whether a function may be called that: it must be sent to the client as UTF-8."""
    return 0 < len(name) <= MAX_NAME and not any('\ud800' <= char <= '\udfff' for char in name)


class ArgumentsObject:
    """The JSON object of a call's arguments, passed on as it comes."""

    def __init__(self, out: Writer) -> None:
        self._out = out
        self._scanner = JsonScanner()
        self._room = MAX_ARGUMENTS
        self.failed = False

    @property
    def done(self) -> bool:
        return self._scanner.done

    def feed(self, text: str, pos: int) -> int:
        """Read from ``pos`` on, where an object begins or goes on; the position behind what belongs to it."""
        end = min(len(text), pos + self._room)
        stop = self._scanner.feed(text, pos, end)
        self._out.part(text[pos:stop], arguments=True)
        self._room -= stop - pos
        self.failed = self._scanner.failed or (stop < len(text) and not self.done)
        return stop


class CallObject:
    """``{"name": "f", "arguments": {...}}``, in any order, with further keys, which are passed over.

    The arguments may be called ``parameters``, and may be null or left out for a call without any. The call starts
    when its name and the first character of its arguments are known.

    Args:
        out: where the call is written to.
        bare: nothing but its shape makes the object a call: it must have arguments, and only usual keys.
        names: the functions that a bare call can mean; None: any.
    """

    def __init__(self, out: Writer, bare: bool = False, names: Collection[str] | None = None) -> None:
        self._out = out
        self._bare = bare
        self._names = names
        self._state: State = self._open
        self._room = MAX_ENVELOPE
        self._scanner = JsonScanner()
        self._raw: list[str] = []
        self._key = ''
        self._seen: set[str] = set()
        self._name = ''
        self._arguments: ArgumentsObject | None = None
        self.done = False
        self.failed = False

    @property
    def complete(self) -> bool:
        """The arguments are whole (or there are none in a whole call)."""
        return self.done or (self._arguments is not None and self._arguments.done)

    def feed(self, text: str, pos: int) -> int:
        """Read from ``pos`` on; the position behind what belongs to the call, if it is done or has failed."""
        while pos < len(text) and not self.done and not self.failed:
            if self._room <= 0:
                self.failed = True
                break
            pos = self._state(text, pos)
        return pos

    # States: each reads some characters.

    def _open(self, text: str, pos: int) -> int:
        return self._expect(text, pos, '{', self._first_key)

    def _first_key(self, text: str, pos: int) -> int:
        return self._close(text, pos) if text[pos] == '}' else self._next_key(text, pos)

    def _next_key(self, text: str, pos: int) -> int:
        return self._string(text, pos, self._in_key)

    def _in_key(self, text: str, pos: int) -> int:
        pos = self._scan(text, pos)
        if self._scanner.done:
            key = json.loads(''.join(self._raw))
            self._key = KEYS.get(key, '')
            unusual = self._bare and not self._key and key not in PLAIN_KEYS
            self.failed = unusual or self._key in self._seen
            self._seen |= {self._key} - {''}
            self._state = self._colon
        return pos

    def _colon(self, text: str, pos: int) -> int:
        return self._expect(text, pos, ':', self._value)

    def _value(self, text: str, pos: int) -> int:
        """In front of a value: nothing but whitespace is read."""
        if text[pos] in SPACE:
            return self._space(text, pos)
        if self._key == NAME:
            return self._string(text, pos, self._in_name)
        if self._key == ARGUMENTS and text[pos] == '{':
            self._arguments = ArgumentsObject(self._out)
            self._state = self._in_arguments
            if self._name:
                self._out.start(self._name)
        elif self._key == ARGUMENTS and (text[pos] != 'n' or self._bare):
            self.failed = True
        else:
            self._scanner = JsonScanner()
            self._state = self._in_value
        return pos

    def _in_name(self, text: str, pos: int) -> int:
        pos = self._scan(text, pos)
        if self._scanner.done:
            self._name = json.loads(''.join(self._raw))
            known = self._names is None or self._name in self._names
            self.failed = not usable_name(self._name) or not known
            if self._arguments is not None and not self.failed:
                self._out.start(self._name)
            self._state = self._behind_value
        return pos

    def _in_arguments(self, text: str, pos: int) -> int:
        assert self._arguments is not None
        pos = self._arguments.feed(text, pos)
        self.failed = self._arguments.failed
        if self._arguments.done:
            self._state = self._behind_value
        return pos

    def _in_value(self, text: str, pos: int) -> int:
        pos = self._scan(text, pos)
        if self._scanner.done:
            self._state = self._behind_value
        return pos

    def _behind_value(self, text: str, pos: int) -> int:
        return self._close(text, pos) if text[pos] == '}' else self._expect(text, pos, ',', self._next_key)

    # Steps.

    def _space(self, text: str, pos: int) -> int:
        """Pass over whitespace; may stop early, at the limit."""
        stop = min(skip_space(text, pos), pos + self._room)
        return self._frame(text, pos, stop)

    def _frame(self, text: str, pos: int, stop: int) -> int:
        self._out.part(text[pos:stop])
        self._room -= stop - pos
        return stop

    def _expect(self, text: str, pos: int, char: str, state: State) -> int:
        """Whitespace, or the one character that leads to ``state``."""
        if text[pos] == char:
            self._state = state
            return self._frame(text, pos, pos + 1)
        stop = self._space(text, pos)
        self.failed = stop == pos
        return stop

    def _string(self, text: str, pos: int, state: State) -> int:
        """Whitespace, or a string that ``state`` reads."""
        if text[pos] == '"':
            self._scanner, self._raw, self._state = JsonScanner(), [], state
            return pos
        stop = self._space(text, pos)
        self.failed = stop == pos
        return stop

    def _scan(self, text: str, pos: int) -> int:
        stop = self._scanner.feed(text, pos, min(len(text), pos + self._room))
        self.failed = self._scanner.failed
        self._raw.append(text[pos:stop])
        return self._frame(text, pos, stop)

    def _close(self, text: str, pos: int) -> int:
        """The closing bracket."""
        named = bool(self._name) and not (self._bare and self._arguments is None)
        if not named:
            self.failed = True
            return pos
        if self._arguments is None:
            self._out.start(self._name, empty=True)
        self.done = True
        return self._frame(text, pos, pos + 1)

"""A JSON value checked as it comes, one character after the other."""

from __future__ import annotations

from lmdeploy.serve.parsers.base import SPACE

MAX_DEPTH = 64
"""Nested objects and arrays."""

DIGITS = frozenset('0123456789')
HEX = frozenset('0123456789abcdefABCDEF')
ESCAPES = frozenset('"\\/bfnrt')
LITERALS = {'t': 'rue', 'f': 'alse', 'n': 'ull'}

# Where the scanner is. Numbers follow their grammar: - 0 12 12. 12.3 12e 12e+ 12e+3
(VALUE, FIRST_ITEM, FIRST_KEY, KEY, COLON, NEXT, STRING, ESCAPE, UNICODE, LITERAL,
 MINUS, ZERO, INTEGER, POINT, FRACTION, EXPONENT, SIGN, POWER, DONE, FAILED) = range(20)
WHOLE_NUMBER = frozenset((ZERO, INTEGER, FRACTION, POWER))
SKIPS_SPACE = frozenset((VALUE, FIRST_ITEM, FIRST_KEY, KEY, COLON, NEXT))


class JsonScanner:
    """Finds the end of one JSON value (RFC 8259), or the first character that does not fit.

    A number has no end of its own: it is done at the first character behind it, or at :meth:`close`.
    """

    __slots__ = ('_state', '_stack', '_key', '_rest', '_count')

    def __init__(self) -> None:
        self._state = VALUE
        self._stack: list[str] = []  # the closing brackets that are due
        self._key = False  # the string is a key
        self._rest = ''  # of a literal
        self._count = 0  # hex digits due

    @property
    def done(self) -> bool:
        """The value is whole."""
        return self._state == DONE

    @property
    def failed(self) -> bool:
        """The character at the returned position does not fit."""
        return self._state == FAILED

    def close(self) -> bool:
        """The text is over; whether the value is whole."""
        if not self._stack and self._state in WHOLE_NUMBER:
            self._state = DONE
        return self.done

    def feed(self, text: str, pos: int, end: int) -> int:
        """Read ``text[pos:end]``.

        Returns:
            the position behind the last character that belongs to the value: ``end``, unless the value is done or has
            failed there.
        """
        while pos < end:
            state = self._state
            if state == STRING:
                pos = self._string(text, pos, end)
                continue
            if state >= DONE:
                return pos
            char = text[pos]
            if state in SKIPS_SPACE and char in SPACE:
                pos += 1
                continue
            if self._take(state, char):
                pos += 1
        return pos

    def _string(self, text: str, pos: int, end: int) -> int:
        while pos < end:
            char = text[pos]
            if char == '"':
                if self._key:
                    self._state = COLON
                else:
                    self._value_ends()
                return pos + 1
            if char == '\\':
                self._state = ESCAPE
                return pos + 1
            if char < ' ':
                self._state = FAILED
                return pos
            pos += 1
        return pos

    def _take(self, state: int, char: str) -> bool:
        """One character outside the plain part of a string; False leaves it to the new state."""
        if state in (VALUE, FIRST_ITEM):
            if state == FIRST_ITEM and char == ']':
                return self._pop()
            return self._begin(char)
        if state in (FIRST_KEY, KEY):
            if char == '"':
                self._key, self._state = True, STRING
                return True
            return self._pop() if char == '}' and state == FIRST_KEY else self._fail()
        if state == COLON:
            return self._go(VALUE) if char == ':' else self._fail()
        if state == NEXT:
            if char == ',':
                return self._go(KEY if self._stack[-1] == '}' else VALUE)
            return self._pop() if char == self._stack[-1] else self._fail()
        if state == ESCAPE:
            if char == 'u':
                self._count = 4
                return self._go(UNICODE)
            return self._go(STRING) if char in ESCAPES else self._fail()
        if state == UNICODE:
            if char not in HEX:
                return self._fail()
            self._count -= 1
            return self._go(UNICODE if self._count else STRING)
        if state == LITERAL:
            if char != self._rest[0]:
                return self._fail()
            self._rest = self._rest[1:]
            return True if self._rest else self._value_ends()
        return self._number(state, char)

    def _begin(self, char: str) -> bool:
        if char in '{[':
            if len(self._stack) == MAX_DEPTH:
                return self._fail()
            self._stack.append('}' if char == '{' else ']')
            return self._go(FIRST_KEY if char == '{' else FIRST_ITEM)
        if char == '"':
            self._key = False
            return self._go(STRING)
        if char in LITERALS:
            self._rest = LITERALS[char]
            return self._go(LITERAL)
        if char == '-':
            return self._go(MINUS)
        if char in DIGITS:
            return self._go(ZERO if char == '0' else INTEGER)
        return self._fail()

    def _number(self, state: int, char: str) -> bool:
        if char in DIGITS and state != ZERO:
            if state == MINUS:
                return self._go(ZERO if char == '0' else INTEGER)
            return self._go({POINT: FRACTION, EXPONENT: POWER, SIGN: POWER}.get(state, state))
        if char == '.' and state in (ZERO, INTEGER):
            return self._go(POINT)
        if char in 'eE' and state in (ZERO, INTEGER, FRACTION):
            return self._go(EXPONENT)
        if char in '+-' and state == EXPONENT:
            return self._go(SIGN)
        if state not in WHOLE_NUMBER:
            return self._fail()
        self._value_ends()
        return False

    def _go(self, state: int) -> bool:
        self._state = state
        return True

    def _fail(self) -> bool:
        self._state = FAILED
        return False

    def _pop(self) -> bool:
        self._stack.pop()
        return self._value_ends()

    def _value_ends(self) -> bool:
        return self._go(NEXT if self._stack else DONE)

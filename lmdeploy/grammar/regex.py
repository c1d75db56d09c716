"""Regular expressions: a scan that bounds their size and leaves nothing that two dialects read differently.

Patterns are written for Python or JavaScript and run by a linear-time automaton with the syntax of Rust. One scan,
without backtracking, refuses what that automaton cannot do (look-around, back references) and what it would
understand in another way (possessive repetition, set operations in classes), and adds up how large the pattern
becomes when its repetitions are written out.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmdeploy.errors import RequestError
from lmdeploy.grammar.limits import MAX_GROUPS, MAX_PATTERN, MAX_REPEAT, Budget, too_large

PLAIN_ESCAPES = frozenset('nrtfvasSDW')  # letters that mean the same everywhere
ASCII_DIGIT, WORD = '0-9', r'\p{L}\p{N}_'


def scan(pattern: str, budget: Budget, *, translate: bool) -> str:
    """The pattern, or with ``translate`` the same in the automaton's syntax: ``\\d`` is ASCII, ``\\w`` any letter.

    Args:
        budget: pays for the expanded size.

    Raises:
        RequestError: LMD-321 (too large), LMD-324 (not supported).
    """
    if len(pattern) > MAX_PATTERN:
        raise too_large('number of characters of a regular expression', len(pattern), MAX_PATTERN)
    scanner = _Scanner(pattern)
    text = scanner.run()
    budget.take_expanded(scanner.size)
    return text if translate else pattern


@dataclass(slots=True)
class _Group:
    """An open group: the size of what it holds, and of its last item (0: nothing that can be repeated)."""

    size: int = 0
    last: int = 0
    repeated: bool = False

    def add(self, size: int) -> None:
        self.size += size
        self.last, self.repeated = size, False

    def repeat(self, times: int) -> None:
        self.size += self.last * (times - 1)
        self.last, self.repeated = self.last * times, True


class _Scanner:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.out: list[str] = []
        self.groups = [_Group()]

    @property
    def size(self) -> int:
        return self.groups[0].size

    def run(self) -> str:
        pattern = self.pattern
        while self.at < len(pattern):
            char, group = pattern[self.at], self.groups[-1]
            if char == '\\':
                self._escape(inside=False)
                group.add(1)
            elif char == '[':
                self._class()
                group.add(1)
            elif char == '(':
                self._open()
            elif char == ')':
                self._take(1)
                if len(self.groups) == 1:
                    raise self._refuse('a group is closed that was never opened')
                self.groups.pop()
                self.groups[-1].add(max(group.size, 1))
            elif char in '*+?{':
                self._repeat(group)
            elif char == '|':
                self._take(1)
                group.last = 0
            elif char in '^$':
                self._take(1)
                group.last = 0
            else:
                self._take(1)
                group.add(1)
        if len(self.groups) > 1:
            raise self._refuse('a group is not closed')
        return ''.join(self.out)

    def _refuse(self, reason: str) -> RequestError:
        return RequestError('LMD-324', pattern=shortened(self.pattern), position=self.at, reason=reason)

    def _take(self, count: int) -> str:
        text = self.pattern[self.at:self.at + count]
        self.at += count
        self.out.append(text)
        return text

    def _escape(self, *, inside: bool) -> None:
        """An escape, which in a class (``inside``) may stand for several characters too."""
        char = self.pattern[self.at + 1:self.at + 2]
        if char == 'd':
            self._replace(2, ASCII_DIGIT if inside else f'[{ASCII_DIGIT}]')
        elif char == 'w':
            self._replace(2, WORD if inside else f'[{WORD}]')
        elif char and char in 'pPxu':
            self._take(2)
            if self.pattern.startswith('{', self.at):
                end = self.pattern.find('}', self.at)
                if end < 0:
                    raise self._refuse('a brace is not closed')
                self._take(end + 1 - self.at)
            elif char in 'xu':
                digits = 2 if char == 'x' else 4
                code = self.pattern[self.at:self.at + digits]
                if len(code) < digits or not all(c in '0123456789abcdefABCDEF' for c in code):
                    raise self._refuse(f'\\{char} needs {digits} hexadecimal digits')
                self._take(digits)
        elif char in PLAIN_ESCAPES or (char and char.isascii() and char.isprintable() and not char.isalnum()):
            self._take(2)
        else:
            raise self._refuse('only plain escapes are supported: no back references or word boundaries')

    def _replace(self, count: int, text: str) -> None:
        self.at += count
        self.out.append(text)

    def _class(self) -> None:
        """``[...]``, up to its end."""
        self._take(1)
        if self.pattern.startswith('^', self.at):
            self._take(1)
        first = True
        while True:
            char = self.pattern[self.at:self.at + 1]
            if not char:
                raise self._refuse('a class is not closed')
            if char == ']' and not first:
                self._take(1)
                return
            if char == '[' or self.pattern[self.at:self.at + 2] in ('&&', '--', '~~'):
                raise self._refuse('in a class, write \\[ for a bracket and escape doubled &, - and ~')
            if char == ']':
                raise self._refuse('an empty class; write \\] for a bracket')
            if char == '\\':
                self._escape(inside=True)
            else:
                self._take(1)
            first = False

    def _open(self) -> None:
        if len(self.groups) > MAX_GROUPS:
            raise too_large('nesting depth of groups', len(self.groups), MAX_GROUPS)
        rest = self.pattern[self.at + 1:self.at + 5]
        if rest.startswith(('?P<', '?<')) and not rest.startswith(('?<=', '?<!')):
            end = self.pattern.find('>', self.at)
            if end < 0:
                raise self._refuse('the name of a group is not closed')
            self._take(end + 1 - self.at)
        elif rest.startswith('?:'):
            self._take(3)
        elif self.at == 0 and rest.startswith(('?i)', '?s)')):
            self._take(4)
            return
        elif rest.startswith('?'):
            raise self._refuse('look-around, conditions and most flags are not supported')
        else:
            self._take(1)
        self.groups.append(_Group())

    def _repeat(self, group: _Group) -> None:
        if not group.last:
            raise self._refuse('there is nothing to repeat (write \\{ for a brace)')
        if group.repeated:
            raise self._refuse('a repetition is repeated, or possessive')
        if self.pattern[self.at] == '{':
            group.repeat(self._braces())
        else:
            self._take(1)
            group.repeat(1)
        if self.pattern.startswith('?', self.at):  # lazy: the same texts match
            self._take(1)

    def _braces(self) -> int:
        """``{n}``, ``{n,}``, ``{n,m}``: how often its item is written out."""
        end = self.pattern.find('}', self.at)
        low, comma, high = self.pattern[self.at + 1:end if end > 0 else self.at + 1].partition(',')
        if not low.isdecimal() or not low.isascii() or (high and not (high.isdecimal() and high.isascii())):
            raise self._refuse('a repetition has the form {n}, {n,} or {n,m} (write \\{ for a brace)')
        if len(low) > 6 or len(high) > 6 or max(int(low), int(high or 0)) > MAX_REPEAT:
            raise too_large('count in braces of a regular expression', self.pattern[self.at:end + 1][:20], MAX_REPEAT)
        if high and int(high) < int(low):
            raise self._refuse('a repetition {n,m} needs n <= m')
        self._take(end + 1 - self.at)
        return max(int(high or low), 1) + (1 if comma and not high else 0)


def shortened(text: str) -> str:
    """A text for an error message."""
    return text if len(text) <= 60 else text[:57] + '...'

"""How large a grammar may be, and the measuring of what was given before anything walks through it.

The limits are generous for people's schemas and small for machines: whatever passes them compiles in a fraction of a
second. They hold before compilation; the automata's own limits are in :mod:`lmdeploy.grammar.automata`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lmdeploy.errors import RequestError

MAX_BYTES = 64 * 1024  # of a schema, all its texts and numbers together
MAX_JSON_DEPTH = 64  # containers within containers
MAX_DEPTH = 32  # schemas within schemas
MAX_ENTRIES = 1000  # properties, enum entries and alternatives of a schema
MAX_PATTERN = 512  # characters of a regular expression
MAX_REPEAT = 1000  # {n,m}
MAX_GROUPS = 32  # groups within groups
MAX_EXPANDED = 20_000  # characters and classes of all regular expressions, repetitions written out
MAX_COUNT = 1_000_000  # minLength, maxItems and the like
MAX_MULTIPLE = 10_000  # the automaton of multipleOf has as many states
MAX_INTEGER = 1 << 53  # beyond it, numbers of JSON are not exact


def too_large(what: str, found: object, most: int) -> RequestError:
    """A limit is exceeded."""
    return RequestError('LMD-321', what=what, found=found, most=most)


def not_json(reason: str) -> RequestError:
    """A schema that is no JSON value."""
    return RequestError('LMD-323', where='#', reason=reason)


def measure(value: Any) -> None:
    """Refuse what is no JSON value, or a large one, without recursion and in time bounded by the limits.

    Raises:
        RequestError: LMD-321 (too large, too deep), LMD-323 (not JSON).
    """
    size = 0
    todo: list[tuple[Any, int]] = [(value, 1)]
    while todo:
        item, depth = todo.pop()
        if isinstance(item, (dict, list, tuple)):
            if depth > MAX_JSON_DEPTH:
                raise too_large('nesting depth', f'more than {MAX_JSON_DEPTH}', MAX_JSON_DEPTH)
            size += 2 + len(item)
            if size <= MAX_BYTES:  # a list of a million entries is not put on the stack
                if isinstance(item, dict):
                    todo += [(key, 0) for key in item]
                    item = list(item.values())
                todo += [(child, depth + 1) for child in item]
        else:
            if depth == 0 and not isinstance(item, str):
                raise not_json(f'a key is a {type(item).__name__}, not a text')
            size += _size(item)
        if size > MAX_BYTES:
            raise too_large('size in bytes', f'more than {MAX_BYTES}', MAX_BYTES)


def _size(item: Any) -> int:
    if item is None or isinstance(item, bool):
        return 4
    if isinstance(item, str):
        if len(item) > MAX_BYTES:
            return len(item)
        try:
            return 2 + len(item.encode())
        except UnicodeEncodeError as error:
            raise not_json('a text has a lone surrogate, which is no character') from error
    if isinstance(item, int):
        if not -MAX_INTEGER <= item <= MAX_INTEGER:
            raise not_json('an integer is beyond 2^53, where JSON numbers are not exact')
        return 8
    if isinstance(item, float):
        if not math.isfinite(item):
            raise not_json('a number is not finite')
        return 8
    raise not_json(f'a {type(item).__name__} is no JSON value')


@dataclass(slots=True)
class Budget:
    """What is left for one grammar, over all its parts."""

    entries: int = MAX_ENTRIES
    expanded: int = MAX_EXPANDED
    multiple: int = 1  # least common multiple of all multipleOf, times ten to the power of ``digits``
    digits: int = 0

    def take_entries(self, count: int) -> None:
        """``count`` properties or alternatives more."""
        self.entries -= count
        if self.entries < 0:
            raise too_large('number of properties, enum entries and alternatives', MAX_ENTRIES - self.entries,
                            MAX_ENTRIES)

    def take_expanded(self, size: int) -> None:
        """A regular expression of ``size`` more, with its repetitions written out."""
        self.expanded -= size
        if self.expanded < 0:
            raise too_large('size of the regular expressions with repetitions written out',
                            MAX_EXPANDED - self.expanded, MAX_EXPANDED)

    def take_multiple(self, value: int, digits: int) -> None:
        """A multipleOf of ``value * 10 ** -digits``."""
        if digits > self.digits:
            self.multiple *= 10 ** (digits - self.digits)
            self.digits = digits
        self.multiple = math.lcm(self.multiple, value * 10 ** (self.digits - digits))
        if self.multiple > MAX_MULTIPLE:
            raise too_large('least common multiple of all multipleOf, in units of their last digit', self.multiple,
                            MAX_MULTIPLE)

"""How much one rendering may do: seconds, characters made, and the size of nested values."""

from __future__ import annotations

import threading
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from typing import Any

SECONDS = 2.0
OUTPUT_CHARS = 4 << 20
WORK_CHARS = 64 << 20  # all texts and list entries made on the way, the discarded ones included
TREE_CHARS = 16 << 20  # of one value, written out: what comparing or printing it costs
ENTRY_CHARS = 8  # what one number, or one entry of a list, counts


class LimitExceeded(Exception):
    """A rendering went beyond one of its limits; the message names the limit."""


class Budget:
    """What is left of one rendering. Every operation of a template that can loop or make text spends some of it."""

    __slots__ = ('_trees', 'deadline', 'work')

    def __init__(self) -> None:
        self.deadline = time.monotonic() + SECONDS
        self.work = WORK_CHARS
        self._trees: dict[int, tuple[Any, int]] = {}  # the value is kept, so that its id stays its own

    def spend(self, chars: int = 1) -> None:
        """Count work, before it is done where its size is known.

        Raises:
            LimitExceeded: the time or the work is used up.
        """
        self.work -= chars
        if self.work < 0:
            raise LimitExceeded(f'{WORK_CHARS >> 20} Mi characters of intermediate text')
        if time.monotonic() > self.deadline:
            raise LimitExceeded(f'{SECONDS:g} seconds')

    def spend_on(self, value: Any) -> Any:
        """Count a value that was just made, and return it."""
        if isinstance(value, (str, bytes)):
            self.spend(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.spend(ENTRY_CHARS * len(value))
            self.tree(value)
        else:
            self.spend()
        return value

    def tree(self, value: Any) -> int:
        """How many characters a value has when it is written out.

        A list that holds another list twice is written out with both copies: forty such steps and it has 10^12
        characters, though the lists themselves are small. So every list counts what is in it, once and for all.

        Raises:
            LimitExceeded: it has more than 16 Mi.
        """
        if isinstance(value, (str, bytes)):
            return len(value) + 2
        if isinstance(value, int):
            return ENTRY_CHARS + value.bit_length() // 3
        if not isinstance(value, (list, tuple, dict, ItemsView, KeysView, ValuesView)):
            return ENTRY_CHARS
        known = self._trees.get(id(value))
        if known is not None:
            return known[1]
        size = ENTRY_CHARS
        for item in value.items() if isinstance(value, dict) else value:
            size += self.tree(item[0]) + self.tree(item[1]) if isinstance(value, dict) else self.tree(item)
            if size > TREE_CHARS:
                raise LimitExceeded(f'{TREE_CHARS >> 20} Mi characters in one value')
        self._trees[id(value)] = (value, size)
        return size

    def joined(self, value: Any, parts: tuple[Any, ...]) -> None:
        """Count a list that consists of others; cheaper than :meth:`tree` of it, as they were counted before."""
        size = sum(map(self.tree, parts))
        if size > TREE_CHARS:
            raise LimitExceeded(f'{TREE_CHARS >> 20} Mi characters in one value')
        self._trees[id(value)] = (value, size)

    def count(self, iterable: Iterable[Any]) -> Iterator[Any]:
        """The items, spending at every one."""
        for item in iterable:
            self.spend()
            yield item


_running = threading.local()


def current() -> Budget:
    """The budget of the rendering that this thread is in; a fresh one outside of any."""
    return getattr(_running, 'budget', None) or Budget()


@contextmanager
def running(budget: Budget) -> Iterator[Budget]:
    """Make ``budget`` the thread's current one."""
    outer = getattr(_running, 'budget', None)
    _running.budget = budget
    try:
        yield budget
    finally:
        _running.budget = outer

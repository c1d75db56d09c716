"""Stop strings across token borders, in one pass over the text.

The strings form an Aho-Corasick automaton: after each character its state is the longest end of the text that begins
a stop string, which is exactly what must be held back. So the work is proportional to the text, and what has been
shown never contains a part of the stop string that ends it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from lmdeploy.errors import RequestError


class StopFilter:
    """Cuts a streamed text at the first stop string.

    The string whose last character comes first ends the text; of several that end there, the longest, so that no part
    of it has been shown. The result depends on the text alone, not on how it was cut into pieces.

    Args:
        stops: the strings; none at all lets every text through at once.
        include: keep the matched string at the end of the text.

    Raises:
        RequestError: LMD-162: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        for index, stop in enumerate(stops):
            if not stop:
                raise RequestError('LMD-162', index=index)
        self._automaton = _Automaton(tuple(dict.fromkeys(stops)))
        self._include = include
        self._state = 0
        self._held = ''
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text to show now, the stop string that has ended the text or None); after the end nothing is shown."""
        if self.matched is not None:
            return '', self.matched
        if not self._automaton.stops:
            return text, None
        state, step, depth, found = self._state, self._automaton.step, self._automaton.depth, self._automaton.found
        for pos, char in enumerate(text):
            state = step(state, char)
            stop = found[state]
            if stop is not None:
                self.matched = stop
                seen = self._held + text[:pos + 1]
                self._held = ''
                return seen if self._include else seen[:len(seen) - len(stop)], stop
        self._state = state
        seen = self._held + text if self._held else text
        shown = len(seen) - depth[state]
        self._held = seen[shown:]
        return seen[:shown], None

    def flush(self) -> str:
        """What was held back, at the end of a text that no stop string ended."""
        held, self._held, self._state = self._held, '', 0
        return held


class _Automaton:
    """Aho-Corasick over characters, without a full transition table: a step follows fallbacks, O(1) on average.

    Attributes:
        depth: per state, how many characters of the text's end it stands for.
        found: per state, the longest stop string that ends there, or None.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self.depth = [0]
        self.found: list[str | None] = [None]
        for stop in stops:
            state = 0
            for char in stop:
                if char not in self._next[state]:
                    self._next[state][char] = len(self._next)
                    self._next.append({})
                    self._fail.append(0)
                    self.depth.append(self.depth[state] + 1)
                    self.found.append(None)
                state = self._next[state][char]
            self.found[state] = stop
        waiting = deque(self._next[0].values())
        while waiting:  # breadth first: a state's fallback is shallower, hence finished
            state = waiting.popleft()
            for char, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], char)
                self.found[child] = self.found[child] or self.found[self._fail[child]]
                waiting.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)

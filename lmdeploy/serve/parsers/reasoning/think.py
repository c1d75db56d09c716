"""``<think>reasoning</think>content``."""

from __future__ import annotations

from lmdeploy.serve.parsers.base import Split
from lmdeploy.serve.parsers.markers import MarkerScanner

OPEN, CLOSE = '<think>', '</think>'
BREAKS = '\r\n'

BEFORE, ENTERED, INSIDE, LEFT, CONTENT = range(5)


class ThinkParser:
    """Parts the reasoning of one answer from its content.

    Neither the tags nor the line breaks next to them (up to 64 whitespace characters in front of the closing one) are
    part of either. Only one block is reasoning, and only at the beginning: the same tags further on are text that
    speaks of them. A block that is never closed is reasoning to its end.

    Args:
        inside: the answer begins inside the reasoning, because the prompt has opened it or because the model leaves
            the opening tag out (one is passed over if it is there all the same).
    """

    def __init__(self, inside: bool = False) -> None:
        self._state = ENTERED if inside else BEFORE
        self._scanner = MarkerScanner(OPEN, CLOSE) if inside else MarkerScanner(OPEN)

    def push(self, text: str) -> Split:
        """What the next piece of the answer adds to either side."""
        reasoning: list[str] = []
        pos = 0
        while pos < len(text):
            if self._state == CONTENT:
                return Split(''.join(reasoning), text[pos:])
            if self._state == LEFT:
                rest = text[pos:].lstrip(BREAKS)
                if rest:
                    self._state = CONTENT
                return Split(''.join(reasoning), rest)
            if self._state == BEFORE:
                pos, content = self._before(text, pos)
                if content:
                    return Split('', content + text[pos:])
            else:
                pos = self._inside(text, pos, reasoning)
        return Split(''.join(reasoning), '')

    def flush(self) -> Split:
        """What was held back."""
        rest = ''.join(self._scanner.take_rest())
        if self._state == ENTERED:
            rest = rest.lstrip(BREAKS)
        return Split('', rest) if self._state == BEFORE else Split(rest, '')

    def _before(self, text: str, pos: int) -> tuple[int, str]:
        """In front of the answer: (position, the content that has begun without any reasoning)."""
        pos = self._scanner.feed(text, pos)
        content = self._scanner.take_text()
        if content:
            self._state = CONTENT
            content += ''.join(self._scanner.take_rest())
        elif self._scanner.found:
            self._enter()
        return pos, content

    def _enter(self) -> None:
        self._scanner.take_rest()
        self._scanner.markers = (CLOSE,)
        self._state = ENTERED

    def _inside(self, text: str, pos: int, reasoning: list[str]) -> int:
        pos = self._scanner.feed(text, pos)
        found = self._scanner.found
        self._reason(self._scanner.take_text(), reasoning)
        if found == CLOSE:
            self._scanner.take_rest()
            self._state = LEFT
        elif found:
            if self._state == ENTERED:
                self._enter()
            else:
                self._reason(''.join(self._scanner.take_rest()), reasoning)
        return pos

    def _reason(self, text: str, reasoning: list[str]) -> None:
        if self._state == ENTERED:
            text = text.lstrip(BREAKS)
            if text:
                self._state = INSIDE
        reasoning.append(text)

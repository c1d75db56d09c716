"""Markers of a format in a text that comes in pieces."""

from __future__ import annotations

from lmdeploy.serve.parsers.base import MAX_SPACE, SPACE


def skip_space(text: str, pos: int) -> int:
    """The first position from ``pos`` on that holds no whitespace."""
    end = len(text)
    while pos < end and text[pos] in SPACE:
        pos += 1
    return pos


class MarkerScanner:
    """Tells text from markers and the whitespace in front of them, one character after the other.

    A marker begins with ``<`` and has no other one, so a mismatch can only begin anew at the character that does not
    fit: nothing is ever looked at twice. A run of more than 64 whitespace characters is text, wherever it stands.

    Args:
        markers: what to look for; may change between two calls of :meth:`feed`.
    """

    def __init__(self, *markers: str) -> None:
        self.markers = markers
        self.found = ''
        self._text: list[str] = []
        self._space = ''
        self._long = False  # the current run of whitespace is text
        self._seen = ''  # the part of a marker that has been read

    def feed(self, text: str, pos: int) -> int:
        """Read ``text`` from ``pos`` to a marker, which is :attr:`found` then, or to the end; the position behind."""
        self.found = ''
        end = len(text)
        while pos < end:
            if self._seen:
                pos = self._match(text, pos)
                if self.found:
                    return pos
                continue
            begin = pos
            pos = skip_space(text, pos)
            if pos > begin:
                self.space(text[begin:pos])
                continue
            if text[pos] == '<':
                self._seen = '<'
                pos += 1
                continue
            stop = text.find('<', pos)
            body = text[pos:end if stop < 0 else stop].rstrip(SPACE)
            self._text += (self._take_space(), body)
            pos += len(body)
        return pos

    def space(self, text: str) -> None:
        """Whitespace, read by the caller."""
        if not self._long and len(self._space) + len(text) > MAX_SPACE:
            self._text.append(self._space)
            self._space, self._long = '', True
        if self._long:
            self._text.append(text)
        else:
            self._space += text

    def _match(self, text: str, pos: int) -> int:
        seen = self._seen + text[pos]
        if any(marker.startswith(seen) for marker in self.markers):
            self._seen = seen
            if seen in self.markers:
                self.found = seen
            return pos + 1
        self._text += (self._take_space(), self._seen)
        self._seen = ''
        return pos

    def _take_space(self) -> str:
        space, self._space, self._long = self._space, '', False
        return space

    def take_text(self) -> str:
        """The text in front of the whitespace that may belong to a marker."""
        text = ''.join(self._text)
        self._text.clear()
        return text

    def take_rest(self) -> tuple[str, str]:
        """(whitespace, marker or the part of one) behind the text; the scanner begins anew behind them."""
        seen, self._seen, self.found = self._seen, '', ''
        return self._take_space(), seen

"""Whole events only: where an event stream may be cut, so that an error can always follow as an event of its own."""

from __future__ import annotations

MOST_HELD = 256 << 10
ENDS = (b'\n\n', b'\r\n\r\n', b'\r\r')


class EventCutter:
    """Passes bytes on as far as the last event in them is complete; the rest waits for its end.

    The bytes are not changed, and an event is never held up once it is complete. One that is larger than
    :data:`MOST_HELD` is passed on in pieces.
    """

    def __init__(self) -> None:
        self._held = bytearray()

    def push(self, chunk: bytes) -> bytes:
        """What can be passed on after ``chunk`` has come."""
        if not self._held and chunk.endswith(ENDS):
            return chunk
        self._held += chunk
        # an end that lies within one event end of another kind is found by the later of the two
        cut = max(position + len(end) if (position := self._held.rfind(end)) >= 0 else 0 for end in ENDS)
        if not cut and len(self._held) > MOST_HELD:
            cut = len(self._held)
        ready = bytes(self._held[:cut])
        del self._held[:cut]
        return ready

    def flush(self) -> bytes:
        """The rest, after the stream has ended well."""
        rest = bytes(self._held)
        self._held.clear()
        return rest

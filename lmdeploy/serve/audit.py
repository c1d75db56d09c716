"""The audit log: one JSON line per request, written by a thread of its own, rotated by size.

It never holds up a request: when the disk is full or slow, lines are dropped and counted.
"""

from __future__ import annotations

import datetime
import os
import queue
import threading
from pathlib import Path

import msgspec

from lmdeploy.errors import ConfigError
from lmdeploy.log import get_logger

MAX_LINES = 10_000  # that wait to be written
MAX_TEXT = 256


class Entry(msgspec.Struct, omit_defaults=True):
    """What is remembered of a request. Texts are cut; keys, prompts and answers are not among them."""

    time: str
    request: str
    key: str
    client: str
    method: str
    route: str
    model: str
    status: int
    outcome: str
    prompt_tokens: int
    output_tokens: int
    seconds: float
    prompt_digest: str | None = None


def now() -> str:
    """UTC, to the millisecond."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='milliseconds')


class AuditLog:
    """Appends entries to a file.

    Args:
        path: created with mode 0600; at ``max_bytes`` it is renamed to ``path.1`` and so on, ``keep`` old ones stay.
        digests: whether entries may carry a digest of the prompt.

    Raises:
        ConfigError: LMD-528, the file cannot be opened.
    """

    def __init__(self, path: str | Path, *, max_bytes: int = 64 << 20, keep: int = 4, digests: bool = False) -> None:
        self.path = Path(path)
        self.digests = digests
        self.dropped = 0
        self._max_bytes, self._keep = max_bytes, keep
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_LINES)
        try:
            self._fd = self._open()
        except OSError as error:
            raise ConfigError('LMD-528', path=str(path), option='--audit-log', reason=str(error)) from error
        self._thread = threading.Thread(target=self._run, name='lmdeploy-audit', daemon=True)
        self._thread.start()

    def add(self, entry: Entry) -> None:
        """Hand in an entry; returns at once."""
        for name in ('request', 'client', 'route', 'model'):
            setattr(entry, name, getattr(entry, name)[:MAX_TEXT])
        try:
            self._lines.put_nowait(msgspec.json.encode(entry) + b'\n')
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what waits, and close the file; at most five seconds."""
        try:
            self._lines.put(None, timeout=1)
        except queue.Full:
            return
        self._thread.join(5)

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _run(self) -> None:
        while True:
            lines = [self._lines.get()]
            while lines[-1] is not None and not self._lines.empty() and len(lines) < 1000:
                lines.append(self._lines.get())
            data = [line for line in lines if line is not None]
            try:
                self._write(b''.join(data))
            except OSError as error:
                if not self.dropped:
                    get_logger().error('the audit log cannot be written: %s', error)
                self.dropped += len(data)
            if lines[-1] is None:
                os.close(self._fd)
                return

    def _write(self, data: bytes) -> None:
        if os.fstat(self._fd).st_size + len(data) > self._max_bytes:
            self._rotate()
        while data:
            data = data[os.write(self._fd, data):]

    def _rotate(self) -> None:
        for i in range(self._keep, 0, -1):
            older = self.path if i == 1 else self.path.with_name(f'{self.path.name}.{i - 1}')
            if older.exists():
                older.replace(self.path.with_name(f'{self.path.name}.{i}'))
        fd = self._open()
        os.close(self._fd)
        self._fd = fd

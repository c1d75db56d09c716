"""ByteFile: a weight file that is read by ranges.

Files are read, not mapped. A mapped file that somebody truncates or replaces while a model loads kills the process
with a bus error, or silently changes the weights; a read of a missing range is an error with a name. It also keeps the
pages of a large file out of the process's own memory.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from lmdeploy.errors import LoadError


class ByteFile:
    """A regular file opened for reading; ranges can be read from any thread.

    Raises:
        LoadError: LMD-139 where the operating system refuses, LMD-123 where the file ends too early.
    """

    __slots__ = ('_file', '_lock', 'path', 'size')

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            if not path.is_file():  # a pipe or a device would block or have no size
                reason = 'it is not a regular file' if os.path.lexists(path) else 'it does not exist'
                raise LoadError('LMD-139', file=path, reason=reason)
            self._file = open(path, 'rb', buffering=0)  # closed by close()
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise LoadError('LMD-139', file=path, reason=error.strerror or str(error)) from None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (bytes) from ``offset`` on."""
        done = 0
        while done < len(buffer):
            try:
                count = self._read_some(offset + done, buffer[done:])
            except (OSError, ValueError) as error:  # ValueError: the file was closed meanwhile
                raise LoadError('LMD-139', file=self.path, reason=str(error)) from None
            if count == 0:
                raise LoadError('LMD-123', file=self.path, size=offset + done, needed=offset + len(buffer))
            done += count

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset`` on. The caller has checked ``count`` against the file's size."""
        data = bytearray(count)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        self._file.close()

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        if hasattr(os, 'preadv'):
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._lock:  # without positioned reads, the position is shared
            self._file.seek(offset)
            return self._file.readinto(buffer)

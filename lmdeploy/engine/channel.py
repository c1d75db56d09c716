"""Channel: frames over a socket in an event loop."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable

from lmdeploy.engine.wire import RECEIVE_BYTES, Frames

READS_PER_TURN = 4  # of RECEIVE_BYTES: then other work of the loop has its turn
HIGH_WATER = 4 << 20  # bytes that wait for the peer


class Channel:
    """Reads frames as they come and writes without ever blocking. Belongs to one event loop.

    Args:
        sock: closed by :meth:`close`.
        receive: called with the payload of each frame; what it raises ends the channel.
    """

    def __init__(self, sock: socket.socket, receive: Callable[[bytes], None]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._receive = receive
        self._frames = Frames()
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[memoryview] = deque()  # to be written
        self._waiting_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self.ended = asyncio.Event()  # the peer has closed, or :attr:`error`
        self.error: Exception | None = None  # why the channel ended, if not because the peer closed it
        self._loop.add_reader(sock, self._read)

    def send(self, frame: bytearray) -> None:
        """Send a frame; what the peer does not take yet is kept."""
        if self.ended.is_set():
            return
        if not self._waiting:
            try:
                sent = self._sock.send(frame)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self._end(error)
                return
            if sent == len(frame):
                return
            self._loop.add_writer(self._sock, self._write)
            self._put(memoryview(frame)[sent:])
        else:
            self._put(memoryview(frame))

    async def room(self) -> None:
        """Wait while much waits for the peer."""
        await self._room.wait()

    def close(self) -> None:
        """Stop and close the socket; safe to call twice."""
        self._end(None)
        self._sock.close()

    def _put(self, data: memoryview) -> None:
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes > HIGH_WATER:
            self._room.clear()

    def _read(self) -> None:
        try:
            for _ in range(READS_PER_TURN):
                data = self._sock.recv(RECEIVE_BYTES)
                if not data:
                    self._end(None)
                    return
                for payload in self._frames.feed(data):
                    if self.ended.is_set():
                        return
                    self._receive(payload)
                if len(data) < RECEIVE_BYTES or self.ended.is_set():
                    return
        except (BlockingIOError, InterruptedError):
            return
        except Exception as error:  # a broken connection, or a peer that is not understood
            self._end(error)

    def _write(self) -> None:
        try:
            while self._waiting:
                data = self._waiting[0]
                sent = self._sock.send(data)
                self._waiting_bytes -= sent
                if sent < len(data):
                    self._waiting[0] = data[sent:]
                    break
                self._waiting.popleft()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error)
            return
        if self._waiting_bytes <= HIGH_WATER // 2:
            self._room.set()
        if not self._waiting:
            self._loop.remove_writer(self._sock)

    def _end(self, error: Exception | None) -> None:
        if self.ended.is_set():
            return
        self.error = error
        if not self._loop.is_closed() and self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
        self._waiting.clear()
        self._room.set()
        self.ended.set()

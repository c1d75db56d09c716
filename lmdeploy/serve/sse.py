"""Server-sent events: their bytes, and a writer that never holds more than a bounded backlog for a slow reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from lmdeploy.serve.errors import ErrorBody, HttpError, describe
from lmdeploy.serve.http import Send
from lmdeploy.serve.limits import Limits

DONE = b'data: [DONE]\n\n'
_encoder = msgspec.json.Encoder()


def event(value: object) -> bytes:
    """``value`` as one ``data:`` event."""
    buffer = bytearray(b'data: ')
    _encoder.encode_into(value, buffer, 6)
    buffer += b'\n\n'
    return bytes(buffer)


def named_event(name: str, value: object) -> bytes:
    """``value`` as an event with a name; OpenAI's chat has none, others do."""
    buffer = bytearray(b'event: %s\ndata: ' % name.encode())
    _encoder.encode_into(value, buffer, len(buffer))
    buffer += b'\n\n'
    return bytes(buffer)


def error_event(error: BaseException, request_id: str) -> bytes:
    """The event that ends a stream which broke. No ``[DONE]`` follows it: a client can tell broken from complete."""
    fault, detail = describe(error, request_id)
    return event(ErrorBody(detail, detail.message, detail.type, fault.status, detail.param))


class Writer:
    """Sends chunks in the background, joined as far as they have piled up.

    The producer is never held up by its reader: it may run ahead by ``stream_bytes``, and by ``stall_seconds`` of a
    reader that takes nothing at all; then the stream is given up. A reader that keeps up costs one chunk per send.
    """

    def __init__(self, send: Send, limits: Limits) -> None:
        self._send = send
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._backlog = bytearray()
        self._wake = asyncio.Event()
        self._taken = asyncio.Event()
        self._since = 0.0  # when the running send began; 0: none runs
        self._ending = False
        self._task = asyncio.create_task(self._run())

    def write(self, chunk: bytes) -> None:
        """Take a chunk.

        Raises:
            HttpError: LMD-523, the reader is too slow.
            OSError: the connection broke.
        """
        if self._task.done():
            self._task.result()
        if self._since and self._loop.time() - self._since > self._limits.stall_seconds:
            raise self._stalled()
        if len(self._backlog) + len(chunk) > self._limits.stream_bytes and self._backlog:
            raise HttpError('LMD-523', reason=f'more than {self._limits.stream_bytes} bytes were waiting')
        self._backlog += chunk
        self._wake.set()

    async def room(self, size: int) -> None:
        """Wait until a chunk of ``size`` bytes fits, or everything is sent.

        Raises:
            HttpError: LMD-523.
        """
        while self._backlog and len(self._backlog) + size > self._limits.stream_bytes:
            self._taken.clear()
            try:
                await asyncio.wait_for(self._taken.wait(), self._limits.stall_seconds)
            except asyncio.TimeoutError:
                raise self._stalled() from None

    def _stalled(self) -> HttpError:
        return HttpError('LMD-523', reason=f'nothing was taken for {self._limits.stall_seconds} seconds')

    async def finish(self) -> None:
        """Wait until everything is sent.

        Raises:
            HttpError: LMD-523.
        """
        self._ending = True
        self._wake.set()
        try:
            await asyncio.wait_for(asyncio.shield(self._task), self._limits.stall_seconds)
        except asyncio.TimeoutError:
            raise self._stalled() from None

    async def close(self) -> None:
        """Give up what was not sent."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._backlog:
                chunk = bytes(self._backlog)
                self._backlog.clear()
                self._since = self._loop.time()
                await self._send({'type': 'http.response.body', 'body': chunk, 'more_body': True})
                self._since = 0.0
                self._taken.set()
            if self._ending:
                return


async def pump(chunks: AsyncGenerator[bytes, None], writer: Writer) -> None:
    """Write all chunks."""
    async with aclosing(chunks):
        async for chunk in chunks:
            writer.write(chunk)

"""LoopThread: one event loop in a daemon thread, and synchronous calls into it."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import CancelledError
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeVar

from lmdeploy.errors import RequestError

T = TypeVar('T')
JOIN_SECONDS = 10.0  # a task that does not end after it was cancelled holds up closing for so long at most


class LoopThread:
    """Runs coroutines for threads that have no loop. An interrupted caller (Ctrl-C) cancels what it waited for."""

    def __init__(self, name: str = 'lmdeploy-loop') -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._closing = False
        self._gate = threading.RLock()  # nothing is handed to the loop once it is closing; a finalizer may re-enter
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._closing or not self._thread.is_alive()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for ``coroutine`` in the loop.

        Raises:
            RequestError: the thread was stopped (LMD-315), or belongs to the process before a fork (LMD-316).
        """
        try:
            with self._open():
                future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except BaseException:
            coroutine.close()
            raise
        try:
            return future.result()
        except CancelledError:
            raise RequestError('LMD-315') from None
        except BaseException:
            future.cancel()  # a no-op when the coroutine itself raised
            raise

    def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of ``stream``; closing or dropping the iterator, or interrupting it, closes the stream."""
        pump = _Pump(stream)
        with self._open():
            self._loop.call_soon_threadsafe(pump.begin)
        try:
            while True:
                item, end = pump.items.get()
                if end is None:
                    yield item
                elif isinstance(end, StopAsyncIteration):
                    return
                elif isinstance(end, asyncio.CancelledError):
                    raise RequestError('LMD-315')
                else:
                    raise end
        finally:
            if not pump.ended.is_set() and self._pid == os.getpid():
                with suppress(RuntimeError):  # the loop was closed although this stream would not end
                    self._loop.call_soon_threadsafe(pump.cancel)
                pump.ended.wait(timeout=5)

    def close(self) -> None:
        """Stop the loop and its thread, cancelling what still runs; safe to call twice."""
        if self._pid != os.getpid():
            return
        with self._gate:
            if self.closed:
                return
            self._closing = True
            asyncio.run_coroutine_threadsafe(_cancel_all(self._loop), self._loop)
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_SECONDS)
            if not self._thread.is_alive():
                self._loop.close()

    def check(self) -> None:
        """Raise what :meth:`run` would raise."""
        if self._pid != os.getpid():
            raise RequestError('LMD-316')
        if self.closed:
            raise RequestError('LMD-315')

    @contextmanager
    def _open(self) -> Iterator[None]:
        """What is handed to the loop in here runs, or is cancelled by :meth:`close`."""
        self.check()  # before the gate, which a forked child may find locked for ever
        with self._gate:
            self.check()
            yield


class _Pump:
    """Carries the items of one stream out of the loop. The end is told even if the task is cancelled before it starts.

    Attributes:
        items: ``(item, None)``, and at last ``(None, why it ended)``.
        ended: set when the stream is closed.
    """

    def __init__(self, stream: AsyncGenerator[Any, None]) -> None:
        self.items: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.ended = threading.Event()
        self._stream = stream
        self._task: asyncio.Task[None]

    def begin(self) -> None:
        """Called in the loop, once."""
        self._task = asyncio.ensure_future(self._run())
        self._task.add_done_callback(self._end)

    def cancel(self) -> None:
        """Called in the loop, after :meth:`begin`."""
        self._task.cancel()

    async def _run(self) -> None:
        async with aclosing(self._stream):
            async for item in self._stream:
                self.items.put((item, None))

    def _end(self, task: asyncio.Task[None]) -> None:
        self.ended.set()
        end = asyncio.CancelledError() if task.cancelled() else task.exception()
        self.items.put((None, end or StopAsyncIteration()))


async def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    """The loop's last task: everything else was started before it."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=JOIN_SECONDS / 2)
    await asyncio.sleep(0)  # the ends of tasks that were done already are told before the loop stops
    loop.stop()

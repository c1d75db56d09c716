"""LoopThread: one event loop in a daemon thread, and synchronous calls into it."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

from lmdeploy.errors import RequestError

T = TypeVar('T')


class LoopThread:
    """Runs coroutines for threads that have no loop. An interrupted caller (Ctrl-C) cancels what it waited for."""

    def __init__(self, name: str = 'lmdeploy-loop') -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed() or not self._thread.is_alive()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for ``coroutine`` in the loop.

        Raises:
            RequestError: the thread was stopped (LMD-315), or belongs to the process before a fork (LMD-316).
        """
        try:
            self._check()
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except BaseException:
            coroutine.close()
            raise
        try:
            return future.result()
        except BaseException:
            future.cancel()  # a no-op when the coroutine itself raised
            raise

    def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of ``stream``; closing or dropping the iterator, or interrupting it, closes the stream."""
        self._check()
        items: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        ended = threading.Event()
        future = asyncio.run_coroutine_threadsafe(_pump(stream, items, ended), self._loop)
        try:
            while True:
                item, error = items.get()
                if isinstance(error, StopAsyncIteration):
                    return
                if isinstance(error, asyncio.CancelledError):
                    raise RequestError('LMD-315')
                if error is not None:
                    raise error
                yield item
        finally:
            if not ended.is_set() and self._pid == os.getpid():
                future.cancel()
                ended.wait(timeout=5)

    def close(self) -> None:
        """Stop the loop and its thread, cancelling what still runs; safe to call twice."""
        if self._pid != os.getpid() or self.closed:
            return
        if threading.current_thread() is self._thread:
            self._loop.call_soon(self._loop.stop)
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise RequestError('LMD-316')
        if self.closed:
            raise RequestError('LMD-315')


async def _pump(stream: AsyncGenerator[T, None], items: queue.SimpleQueue, ended: threading.Event) -> None:
    end: BaseException = StopAsyncIteration()
    try:
        try:
            async for item in stream:
                items.put((item, None))
        finally:
            await stream.aclose()
    except BaseException as error:  # handed to the waiting thread, whatever it is
        end = error
        if isinstance(error, asyncio.CancelledError):
            raise
    finally:
        ended.set()
        items.put((None, end))


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

"""ThreadClient: the engine in a thread of this process.

One daemon thread builds the core, steps it, and sleeps while it is idle. Each step's deltas cross to the event loops
of their consumers in one call per loop.

The thread that steps also loads the model, since every thread that runs parallel CPU work gets a team of OpenMP threads
for life: with two teams there are more threads than processors, and then waiting ones sleep instead of spinning, which
costs a sixth of the speed of a prefill.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.faults import fatal
from lmdeploy.engine.metrics import EngineStats
from lmdeploy.engine.request import EngineInput, Finish, TokenDelta
from lmdeploy.errors import EngineDead, RequestError
from lmdeploy.executor.base import Capacity

JOIN_SECONDS = 30.0  # a step that runs when the client is closed may take so long


@dataclass(slots=True, eq=False)
class _Stream:
    """A consumer: its event loop, and what it has not read yet."""

    loop: asyncio.AbstractEventLoop
    deltas: asyncio.Queue[TokenDelta] = field(default_factory=asyncio.Queue)
    closed: bool = False  # nobody reads any more


class ThreadClient:
    """Serves requests to any number of threads and event loops.

    Args:
        build: makes the engine, in this client's thread; only that thread ever touches it. What it raises, the
            constructor raises.
    """

    def __init__(self, build: Callable[[], EngineCore]) -> None:
        self._streams: dict[str, _Stream] = {}  # until the engine has told the end
        self._wake = threading.Condition()
        self._closing = False
        built: Future[EngineCore] = Future()
        self._thread = threading.Thread(target=self._run, args=(build, built), name='lmdeploy-engine', daemon=True)
        self._thread.start()
        try:
            self._core = built.result()
        except BaseException:  # also an interrupt while it loads
            self._closing = True
            raise
        self._stats = self._core.stats()
        self.capacity: Capacity = self._core.scheduler.capacity

    async def submit(self, request: EngineInput) -> AsyncGenerator[TokenDelta, None]:
        """The deltas of ``request``; the last one has a finish. Closing the generator aborts the request.

        Raises:
            EngineDead: the client is closed (LMD-339).
            RequestError: a request of that id is running (LMD-333).
        """
        stream = _Stream(asyncio.get_running_loop())
        with self._wake:
            if self._closing:
                raise EngineDead('LMD-339')
            if request.id in self._streams:
                raise RequestError('LMD-333', id=request.id)
            self._streams[request.id] = stream
            self._core.submit(request)
            self._wake.notify()
        ended = False
        try:
            while not ended:
                delta = await stream.deltas.get()
                ended = delta.finish is not None
                yield delta
        finally:
            if not ended:
                stream.closed = True
                self.abort(request.id)

    def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last delta with reason 'abort'. Unknown ids are ignored."""
        with self._wake:
            if request_id in self._streams:
                self._core.abort(request_id)
                self._wake.notify()

    def stats(self) -> EngineStats:
        """Counters and gauges after the last step."""
        return self._stats

    def close(self) -> None:
        """Abort everything and end the thread; safe to call twice and from any thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_SECONDS)

    def _run(self, build: Callable[[], EngineCore], built: Future[EngineCore]) -> None:
        try:
            core = build()
        except BaseException as cause:
            built.set_exception(cause)
            return
        built.set_result(core)
        try:
            while True:
                with self._wake:
                    while core.idle and not self._closing:
                        self._wake.wait()
                    if self._closing:
                        break
                deltas = core.step()
                self._stats = core.stats()
                self._deliver(deltas)
            self._deliver(core.close())
            self._stats = core.stats()
        except BaseException as cause:  # the bookkeeping itself failed: nobody shall wait for ever
            with self._wake:
                self._closing = True
                streams = list(self._streams)
            self._deliver([TokenDelta(name, [], Finish('error', error=fatal(cause))) for name in streams])
            raise

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, TokenDelta]]] = {}
        for delta in deltas:
            stream = self._streams[delta.id]
            if delta.finish is not None:
                del self._streams[delta.id]
            if not stream.closed:
                batches.setdefault(stream.loop, []).append((stream, delta))
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_put, batch)
            except RuntimeError:  # the loop was closed, and its consumers are gone with it
                for stream, delta in batch:
                    stream.closed = True
                    if delta.finish is None:
                        self._core.abort(delta.id)


def _put(batch: list[tuple[_Stream, TokenDelta]]) -> None:
    for stream, delta in batch:
        stream.deltas.put_nowait(delta)

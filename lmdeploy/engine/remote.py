"""ProcessClient: the engine in a process of its own, started again when it crashes.

Everything happens in one event loop: that of the first call. Reading and writing never block it, and a consumer that
falls behind gets the tokens of several steps as one delta instead of a longer and longer queue. Its parts are
``wire`` (messages), ``channel`` (frames in a loop), ``streams`` (requests), ``supervisor`` (the process), ``suspects``
and ``ledger``; at the other end are ``process`` and ``serving``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine import wire
from lmdeploy.engine.channel import Channel
from lmdeploy.engine.ledger import Ledger
from lmdeploy.engine.metrics import EngineStats
from lmdeploy.engine.request import EngineInput, Finish, TokenDelta
from lmdeploy.engine.streams import Streams
from lmdeploy.engine.supervisor import PROGRAM, Child, CrashLog, Limits, StepWatch
from lmdeploy.engine.suspects import Suspects
from lmdeploy.errors import EngineDead, LmdeployError
from lmdeploy.executor.base import Capacity
from lmdeploy.log import get_logger

TICK_SECONDS = 1.0  # between two looks at a running engine
AUTOPSY_SECONDS = 0.4  # for a process that has closed its socket, or was killed, to end and to be heard
DUMP_SECONDS = 0.5  # for a hanging process to write its stacks
LIMITS = Limits()

State = Literal['loading', 'ready', 'restarting', 'failed', 'sleeping', 'closed']


@dataclass(frozen=True, slots=True)
class Health:
    """How the engine is.

    Attributes:
        state: ``'restarting'``: it crashed, and is started again; ``'failed'``: it is not started again.
        reason: why it does not serve; empty if it does.
        restarts: how often it was started again.
        last_step_age: seconds since a step last ended, while there is work; else 0.
        retry_after: seconds after which it may be ready; 0 where that is unknown or never.
    """

    state: State
    reason: str
    restarts: int
    last_step_age: float
    retry_after: float = 0.0


class ProcessClient:
    """Serves requests of one event loop by an engine in a child process.

    Args:
        config: of the engine.
        path: model folder or ``.gguf`` file.
        restart: start the engine again after a crash.
        limits: of time and crashes.
        program: the command that is started, with the descriptor of a socket and this process's id after it; it speaks
            :mod:`lmdeploy.engine.wire`.

    Attributes:
        capacity: what the started engine holds; after :meth:`ready`.
        context_len: the context length that the model was made for; after :meth:`ready`.
    """

    def __init__(self, config: EngineConfig, path: Path, *, restart: bool = True, limits: Limits = LIMITS,
                 program: Sequence[str] = PROGRAM) -> None:
        self.capacity: Capacity | None = None
        self.context_len = 0
        self._load = wire.Load(config, str(Path(path).absolute()), get_logger().getEffectiveLevel())
        self._restart, self._limits, self._program = restart, limits, program
        self._state: State = 'loading'
        self._reason = 'starting'
        self._error: LmdeployError | None = None  # why no request is served
        self._restarts = 0
        self._retry_at = 0.0
        self._began, self._load_seconds = 0.0, 0.0
        self._streams = Streams()
        self._ledger = Ledger()
        self._crash_log, self._suspects = CrashLog(limits), Suspects()
        self._watch = StepWatch(limits, patient=False)
        self._failure: LmdeployError | None = None  # the engine's own last word
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._channel: Channel | None = None
        self._task: asyncio.Task[None] | None = None
        self._child = Child(program)

    # -- requests ------------------------------------------------------------------------------------------------

    async def submit(self, request: EngineInput) -> AsyncGenerator[TokenDelta, None]:
        """The deltas of ``request``; the last one has a finish. Closing the generator aborts the request.

        Raises:
            EngineDead: the engine does not serve now (LMD-342, 344, 345, 347) or is closed (LMD-339).
            RequestError: LMD-333 (a request of that id is running), LMD-341 and LMD-348 (a part of it is no data),
                LMD-346 (it has crashed the engine twice).
        """
        loop = self._attach()
        frame = wire.submission(request)
        trial = await self._suspects.admit(request)
        try:
            if self._channel is not None:
                await self._channel.room()
            self._refuse()
            assert self._channel is not None
            stream = self._streams.open(request, loop, trial)
            self._watch.work(True)
            self._channel.send(frame)
            ended = False
            try:
                while not ended:
                    delta = await stream.next()
                    ended = delta.finish is not None
                    yield delta
            finally:
                if not ended:
                    stream.closed = True
                    self.abort(request.id)
        finally:
            if trial is not None:
                trial.close()

    def _refuse(self) -> None:
        """Raise why the engine does not serve, if so."""
        if self._state == 'ready':
            return
        if self._state == 'loading':
            raise EngineDead('LMD-342', stage=self._reason)
        if self._state == 'restarting':
            raise EngineDead('LMD-344', cause=self._reason, seconds=max(1, round(self._retry_after)))
        if self._state == 'sleeping':
            raise EngineDead('LMD-347')
        if self._state == 'closed':
            raise EngineDead('LMD-339')
        raise self._error or EngineDead('LMD-339')

    def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last delta with reason 'abort'. Unknown ids are ignored. From any thread."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        if _running_loop() is not loop:
            loop.call_soon_threadsafe(self.abort, request_id)
        elif request_id in self._streams and self._channel is not None:
            self._channel.send(wire.encode(wire.Abort(request_id)))

    # -- state ---------------------------------------------------------------------------------------------------

    async def ready(self) -> Capacity:
        """Wait until the engine serves, also after a crash.

        Raises:
            ConfigError, LoadError, TemplateError: as the engine could not load.
            EngineDead: it has crashed for good, sleeps or is closed.
        """
        self._attach()
        while self._state in ('loading', 'restarting'):
            await self._changed.wait()
        self._refuse()
        assert self.capacity is not None
        return self.capacity

    def health(self) -> Health:
        """How the engine is at this moment."""
        reason = '' if self._state == 'ready' else self._reason
        return Health(self._state, reason, self._restarts, self._watch.age, self._retry_after)

    def stats(self) -> EngineStats:
        """Counters and gauges after the last step that was heard of; counters go on over restarts."""
        return self._ledger.stats()

    @property
    def pid(self) -> int | None:
        """The process id of the engine."""
        return self._child.pid

    @property
    def _retry_after(self) -> float:
        if self._state not in ('loading', 'restarting'):
            return 0.0
        return max(0.0, self._retry_at - time.monotonic()) + self._load_seconds

    def _set(self, state: State, reason: str = '') -> None:
        self._state, self._reason = state, reason
        self._changed.set()
        self._changed = asyncio.Event()

    # -- sleeping and closing ------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """End the engine's process, and with it all it holds of memory; running requests are aborted."""
        self._attach()
        self._refuse()
        await self._leave('sleeping')

    async def wakeup(self) -> None:
        """Start the engine again after :meth:`sleep`, and wait until it serves; raises what :meth:`ready` does."""
        self._attach()
        if self._state == 'sleeping':
            self._child = Child(self._program)
            self._set('loading', 'starting')
            self._start()
        await self.ready()

    async def aclose(self) -> None:
        """:meth:`close` without blocking the loop."""
        await self._leave('closed')

    def close(self) -> None:
        """Abort everything and end the process; safe to call twice and from any thread. Blocks until it has ended."""
        loop = self._loop
        if loop is not None and loop.is_running() and _running_loop() is not loop:
            future = asyncio.run_coroutine_threadsafe(self.aclose(), loop)
            try:
                future.result(3 * self._limits.close)
            except concurrent.futures.TimeoutError:  # the loop stands still
                self._child.kill()
            return
        self._disconnect('closed')
        self._child.stop(self._limits.close)

    async def _leave(self, state: State) -> None:
        self._disconnect(state)
        await asyncio.to_thread(self._child.stop, self._limits.close)

    def _disconnect(self, state: State) -> None:
        self._set(state, state)
        if self._task is not None and not self._task.get_loop().is_closed():
            self._task.cancel()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            self._ledger.crashed(len(self._streams), cancelled=True)
        self._streams.end_all(Finish('abort'))
        self._watch.work(False)

    # -- the process ---------------------------------------------------------------------------------------------

    def _attach(self) -> asyncio.AbstractEventLoop:
        """Begin to watch the process, in the loop of the first call; returns the loop."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._start()
        elif self._loop is not loop:
            raise RuntimeError('a ProcessClient belongs to the event loop that used it first')
        return loop

    def _start(self) -> None:
        if self._state != 'closed':
            assert self._loop is not None
            self._task = self._loop.create_task(self._supervise(), name='lmdeploy-engine')

    async def _supervise(self) -> None:
        """Serve by one child after another until one is told to end, or crashes are too many."""
        while True:
            cause = await self._serve(self._child)
            delay = self._bury(cause)
            if delay is None:
                return
            await asyncio.sleep(delay)
            self._restarts += 1
            self._child = Child(self._program)

    async def _serve(self, child: Child) -> str:
        """Load and serve until ``child`` ends or has to be ended; returns why."""
        self._began = time.monotonic()
        self._failure = None
        self._watch = StepWatch(self._limits, patient=False)
        channel = self._channel = Channel(child.sock, self._receive)
        channel.send(wire.encode(self._load))
        try:
            trouble = await self._look_after(child, channel)
        finally:
            channel.close()
            if self._channel is channel:
                self._channel = None
        if self._state == 'ready':
            self._set('restarting', 'the engine has ended')
        ending = await _end(child, at_once=trouble is not None or self._failure is not None)
        if self._failure is not None:
            return str(self._failure.params.get('cause', self._failure))
        return trouble or ending

    async def _look_after(self, child: Child, channel: Channel) -> str | None:
        """Until the channel ends, or the child has to; returns why in the latter case."""
        tick = min(TICK_SECONDS, self._limits.hang / 10)
        while not channel.ended.is_set():
            before = time.monotonic()
            await _wait(channel.ended, tick)
            if time.monotonic() - before > 2 * tick + 0.5:
                self._watch.excuse()  # this loop stood still: what the engine did meanwhile is not read yet
            elif self._watch.hangs:
                trouble = f'no step has ended for {self._watch.age:.1f} s'
                get_logger().critical('the engine hangs: %s; these are its stacks', trouble)
                child.dump_stacks()
                await asyncio.sleep(DUMP_SECONDS)
                return trouble
            elif self._state != 'ready' and time.monotonic() - self._began > self._limits.load:
                return f'the model was not loaded within {self._limits.load:g} s'
        if channel.error is None or isinstance(channel.error, OSError):
            return None
        return f'it was not understood: {channel.error}'

    def _bury(self, cause: str) -> float | None:
        """After the end of a child: end its requests, and decide; returns the seconds until the next one is started."""
        first = self._state == 'loading'
        if not first or self._failure is None:
            get_logger().critical('the engine process ended: %s', cause)
        self._ledger.crashed(len(self._streams))
        for stream in self._streams.end_all(Finish('error', error=EngineDead('LMD-343', cause=cause))):
            if stream.running:
                self._suspects.accuse(stream.request, stream.generated)
        self._watch.work(False)
        if first:
            self._error = self._failure or EngineDead('LMD-349', cause=cause)
        elif not self._restart:
            self._error = EngineDead('LMD-343', cause=cause)
        else:
            delay = self._crash_log.crashed()
            if delay is not None:
                self._retry_at = time.monotonic() + delay
                self._set('restarting', cause)
                return delay
            limits = self._limits
            self._error = EngineDead('LMD-345', crashes=limits.crashes, seconds=limits.window, cause=cause)
        self._set('failed', self._error.text())
        return None

    # -- messages ------------------------------------------------------------------------------------------------

    def _receive(self, payload: bytes) -> None:
        message = wire.to_server(payload)
        if isinstance(message, wire.Step):
            self._step(message)
        elif isinstance(message, wire.Running):
            self._streams.run(message.ids)
        elif isinstance(message, wire.Ended):
            error = None if message.error is None else message.error.error()
            self._ledger.ended(refused=error is not None)
            finish = Finish('abort') if error is None else Finish('error', error=error)
            self._streams.deliver(TokenDelta(message.id, [], finish))
            self._watch.work(bool(self._streams))
        elif isinstance(message, wire.Stage):
            if self._state == 'loading':
                self._reason = message.text
        elif isinstance(message, wire.Ready):
            self._became_ready(message)
        else:
            self._failure = message.error.error()
            assert self._channel is not None
            self._channel.close()

    def _became_ready(self, message: wire.Ready) -> None:
        if self._state == 'ready':
            raise wire.WireError('a second start')
        self.capacity, self.context_len = message.capacity, message.context_len
        self._ledger.update(message.stats)
        self._watch = StepWatch(self._limits, patient=message.capacity.device == 'cpu')
        self._load_seconds = time.monotonic() - self._began
        self._set('ready')

    def _step(self, message: wire.Step) -> None:
        self._ledger.update(message.stats)
        for part in message.deltas:
            self._streams.deliver(part.delta())
        self._watch.progress(self._ledger.steps, message.seconds)
        self._watch.work(bool(self._streams))


async def _end(child: Child, *, at_once: bool) -> str:
    """The end of a child that has closed its socket, or has to be ended now; returns what it ended of."""
    if at_once:
        child.kill()
    await _poll(lambda: child.heard)
    if not child.ended:
        child.kill()
        await _poll(lambda: child.ended)
    return child.cause()


async def _poll(condition: Callable[[], bool]) -> None:
    """Until the condition, at most :data:`AUTOPSY_SECONDS`. Needs no thread: they may all be busy."""
    deadline = time.monotonic() + AUTOPSY_SECONDS
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.005)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Until the event, at most so long."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except asyncio.TimeoutError:
        pass


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None



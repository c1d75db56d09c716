"""serve(): an engine core at one end of a socket.

The calling thread steps the core and sends each step's deltas as one message; a second thread reads requests and
aborts; a third one builds what takes long (grammars), so that no request waits for another's.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lmdeploy.engine import wire
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.faults import contained
from lmdeploy.engine.plan import StepPlan
from lmdeploy.engine.request import EngineInput, TokenDelta
from lmdeploy.errors import LmdeployError
from lmdeploy.executor.base import Capacity, Executor, StepHandle

QUIET_SECONDS = 0.05  # steps without deltas are told at most this often


class Link:
    """Sends messages from several threads. Blocks while the peer does not read: the engine waits for its server."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, message: wire.ToServer) -> None:
        """Send; to a peer that is gone nothing is sent."""
        frame = wire.encode(message)
        try:
            with self._lock:
                self._sock.sendall(frame)
        except ConnectionError:  # the reading thread notices too, and ends the loop
            pass


class Announcer:
    """An executor that tells which requests are in a step before it runs: if it is the last, they are suspects."""

    def __init__(self, core: EngineCore, link: Link) -> None:
        self._executor: Executor = core.executor
        self._scheduler = core.scheduler
        self._link = link
        self.call, self.stop = self._executor.call, self._executor.stop

    def start(self) -> Capacity:
        return self._scheduler.capacity

    def launch(self, plan: StepPlan) -> StepHandle:
        """Launch, after telling the slots that are opened."""
        if plan.opened:
            slots = {opened.slot for opened in plan.opened}
            self._link.send(wire.Running([r.id for r in self._scheduler.running if r.slot in slots]))
        return self._executor.launch(plan)


MakeRequest = Callable[[wire.Submit, list[np.ndarray]], EngineInput]
"""Makes a request of its message and the pixels of its pictures."""


def plain_intake(message: wire.Submit, pixels: list[np.ndarray]) -> EngineInput:
    """Requests without bad words and grammars."""
    return message.request(pixels)


def serve(core: EngineCore, sock: socket.socket, intake: MakeRequest = plain_intake, *,
          on_end: Callable[[], None] = lambda: None) -> bool:
    """Serve the peer of ``sock``; returns when it has closed its end, or the core is dead.

    Args:
        core: from now on only this call touches it.
        intake: makes a request of its message.
        on_end: called when the peer has gone, from another thread, perhaps while a step still runs.

    Returns:
        Whether the core is alive.

    Raises:
        WireError: the peer sent what is no message.
    """
    return _Server(core, sock, intake, on_end).run()


class _Server:
    def __init__(self, core: EngineCore, sock: socket.socket, intake: MakeRequest, on_end: Callable[[], None]) -> None:
        self._core, self._sock, self._intake, self._on_end = core, sock, intake, on_end
        self._link = Link(sock)
        self._wake = threading.Condition()
        self._ended = False  # the peer is gone
        self._error: wire.WireError | None = None
        self._pixels: dict[str, list[np.ndarray]] = {}  # of requests that are about to come
        self._building: set[str] = set()  # requests that are not in the core yet
        self._builder = ThreadPoolExecutor(1, thread_name_prefix='lmdeploy-intake')
        self._slowest, self._told = 0.0, 0.0
        core.executor = Announcer(core, self._link)

    def run(self) -> bool:
        core, wake = self._core, self._wake
        threading.Thread(target=self._read, name='lmdeploy-intake', daemon=True).start()
        try:
            while True:
                with wake:
                    while core.idle and not self._ended:
                        wake.wait()
                    if self._ended:
                        break
                begin = time.monotonic()
                deltas = core.step()
                if core.dead is not None:
                    self._link.send(wire.Failed(wire.Error.of(core.dead)))
                    return False
                self._tell(deltas, begin)
        finally:
            self._builder.shutdown(wait=False, cancel_futures=True)
        core.close()
        if self._error is not None:
            raise self._error
        return True

    def _tell(self, deltas: list[TokenDelta], begin: float) -> None:
        core, now = self._core, time.monotonic()
        self._slowest = max(self._slowest, now - begin)
        if deltas or now - self._told >= QUIET_SECONDS or core.idle:
            for message in wire.steps(deltas, list(wire.stats_values(core.stats())), self._slowest):
                self._link.send(message)
            self._slowest, self._told = 0.0, now

    def _read(self) -> None:
        try:
            for payload in wire.receive(self._sock, wire.Frames()):
                message = wire.to_engine(payload)
                if isinstance(message, wire.Submit):
                    self._submit(message)
                elif isinstance(message, wire.Pixels):
                    self._pixels.setdefault(message.id, []).append(message.array())
                elif isinstance(message, wire.Abort):
                    self._abort(message.id)
                else:
                    raise wire.WireError('an engine that serves is asked to load')
        except wire.WireError as error:
            self._error = error
        finally:
            with self._wake:
                self._ended = True
                self._wake.notify()
            self._on_end()

    def _submit(self, message: wire.Submit) -> None:
        pixels = self._pixels.pop(message.id, [])
        if not message.bad_words and message.grammar is None:
            with self._wake:
                self._core.submit(message.request(pixels))
                self._wake.notify()
            return
        with self._wake:
            self._building.add(message.id)
        self._builder.submit(self._build, message, pixels)

    def _build(self, message: wire.Submit, pixels: list[np.ndarray]) -> None:
        error, request = None, None
        try:
            request = self._intake(message, pixels)
        except LmdeployError as cause:
            error = cause
        except Exception as cause:
            error = contained(cause)
        with self._wake:
            wanted = message.id in self._building
            self._building.discard(message.id)
            if wanted and request is not None:
                self._core.submit(request)
                self._wake.notify()
                return
        self._link.send(wire.Ended(message.id, wire.Error.of(error) if wanted and error is not None else None))

    def _abort(self, request_id: str) -> None:
        with self._wake:
            if request_id in self._building:
                self._building.discard(request_id)  # told when it is built
                return
            self._core.abort(request_id)
            self._wake.notify()

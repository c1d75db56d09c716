"""A server from its port to its end: bind, answer, load, serve, drain.

The port is taken before the model loads, so that a busy one is found at once, and ``/health`` answers while it loads.
The first SIGTERM or SIGINT drains: ``/ready`` says 503 at once, new requests are turned away for a moment (so that load
balancers notice), running ones may finish within ``drain_seconds`` and then end with an error that says so. The second
signal ends everything at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI

from lmdeploy.errors import BindError, ConfigError
from lmdeploy.serve.addresses import Crowd
from lmdeploy.serve.deadline import Deadline
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.exchange import Counts
from lmdeploy.serve.lag import LoopLag
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.listener import RESERVE, Listener, descriptors, is_starvation
from lmdeploy.serve.meter import Meter

GRACE_SECONDS = 2.0  # new requests are answered with 503 for so long after SIGTERM
CLOSE_SECONDS = 3  # for connections to close after all requests have ended
STATS_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 5
BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one.

    Raises:
        BindError: LMD-501, the port is in use; LMD-502, any other reason.
    """
    if not 0 <= port < 1 << 16:
        raise BindError('LMD-502', host=host, port=port, reason='a port is a number from 0 to 65535')
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                                flags=socket.AI_PASSIVE)[0]
        sock = Listener(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise BindError('LMD-502', host=host, port=port, reason=str(error)) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        sock.close()
        if getattr(error, 'errno', None) == errno.EADDRINUSE:
            raise BindError('LMD-501', host=host, port=port, owner=_owner(port)) from error
        raise BindError('LMD-502', host=host, port=port, reason=str(error)) from error
    sock.setblocking(False)
    return sock


def _owner(port: int) -> str:
    """`` by PID (command)`` for the process that listens on ``port``, as far as /proc tells."""
    inodes = set()
    for table in ('tcp', 'tcp6'):
        try:
            lines = Path('/proc/net', table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if int(fields[1].rsplit(':', 1)[1], 16) == port and fields[3] == '0A':  # listening
                inodes.add(f'socket:[{fields[9]}]')
    for process in Path('/proc').glob('[0-9]*'):
        try:
            if any(os.readlink(fd) in inodes for fd in (process / 'fd').iterdir()):
                command = (process / 'cmdline').read_bytes().replace(b'\0', b' ').decode('utf-8', 'replace').strip()
                return f' by process {process.name} ({command[:80]})'
        except OSError:  # not ours to see, or gone
            continue
    return ''


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    host = sock.getsockname()[0]
    return host.startswith('127.') or host == '::1'


def tls_context(keyfile: str | None, certfile: str | None) -> ssl.SSLContext:
    """The TLS configuration for a key and a certificate.

    Raises:
        ConfigError: LMD-503.
    """
    if not keyfile or not certfile:
        raise ConfigError('LMD-503', reason='SSL_KEYFILE or SSL_CERTFILE is not set')
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certfile, keyfile)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError('LMD-503', reason=f'{error} ({keyfile}, {certfile})') from error
    return context


class ServedCounts(Counts, Protocol):
    """What the life cycle counts."""

    lag: LoopLag


class Served(Protocol):
    """What the life cycle knows of a server."""

    draining: bool
    created: int

    @property
    def limits(self) -> Limits: ...

    @property
    def deadlines(self) -> set[Deadline]: ...

    @property
    def metrics(self) -> ServedCounts: ...

    def meter(self) -> Meter: ...


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who is told what happens.

    Attributes:
        ready: the model serves.
        stats: a line about the last ten seconds, if anything happened in them.
        draining: a signal has come.
    """

    ready: Callable[[], None]
    stats: Callable[[str], None]
    draining: Callable[[], None]


async def serve(app: FastAPI, sock: socket.socket, load: Callable[[], Awaitable[None]], watcher: Watcher, *,
                tls: ssl.SSLContext | None = None, drain_seconds: float = 30.0,
                stop: asyncio.Event | None = None) -> None:
    """Answer at once, load, and serve until a signal, ``stop`` or a failure of ``load``, which is raised.

    Signals are heeded where that is possible: in the main thread.

    The loop is asyncio's own, although uvicorn brings uvloop: a streamed token costs the same processor time on both
    (the engine's messages, JSON and HTTP are most of it; ``benchmark/server_overhead.py``), and uvloop would accept
    connections by itself, past :class:`Listener`, which is what keeps a server without descriptors alive.
    """
    context: Served = app.state.context
    server = _server(app, context, tls)
    drain = Drain(context, drain_seconds, server.leave, watcher.draining)
    tasks = [asyncio.create_task(server.serve([sock]))]
    serving = tasks[0]
    tasks.append(asyncio.create_task(context.metrics.lag.watch()))
    asyncio.get_running_loop().set_exception_handler(_report)
    loading = asyncio.ensure_future(load())
    context.created = int(time.time())
    with _signals(drain):
        try:
            if stop is not None:
                tasks.append(asyncio.create_task(_on_stop(stop, drain)))
            await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                watcher.ready()
                tasks.append(asyncio.create_task(_stats(context.meter(), watcher.stats)))
            await asyncio.wait({serving})
        finally:
            server.leave(at_once=not drain.begun)
            loading.cancel()
            for task in tasks[1:]:
                task.cancel()
            await asyncio.wait({loading, *tasks}, timeout=CLOSE_SECONDS + 2)
            drain.close()


class Drain:
    """The way out. :meth:`begin` may be called from signal handlers of the loop, any number of times."""

    def __init__(self, context: Served, seconds: float, leave: Callable[[bool], None],
                 told: Callable[[], None]) -> None:
        self._context, self._seconds, self._leave, self._told = context, seconds, leave, told
        self._task: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        return self._task is not None

    def begin(self, grace: float = GRACE_SECONDS) -> None:
        """Drain; the second time, end everything at once."""
        if self._task is None:
            self._context.draining = True
            self._told()
            self._task = asyncio.get_running_loop().create_task(self._run(grace))
        else:
            self._give_up()
            self._leave(True)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self, grace: float) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        while loop.time() - start < grace:
            await asyncio.sleep(0.05)
        while self._context.deadlines and loop.time() - start < self._seconds:
            await asyncio.sleep(0.05)
        self._give_up()
        for _ in range(20):  # for their last words to be written
            if not self._context.deadlines:
                break
            await asyncio.sleep(0.05)
        self._leave(False)

    def _give_up(self) -> None:
        for deadline in list(self._context.deadlines):
            deadline.expire(HttpError('LMD-520'))


async def _on_stop(stop: asyncio.Event, drain: Drain) -> None:
    await stop.wait()
    drain.begin(grace=0.0)


@contextmanager
def _signals(drain: Drain) -> Iterator[None]:
    """SIGTERM drains with a moment's grace, SIGINT (somebody waits for the prompt) without."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, drain.begin)
    loop.add_signal_handler(signal.SIGINT, drain.begin, 0.0)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        loop.remove_signal_handler(signal.SIGINT)


def _server(app: FastAPI, context: Served, tls: ssl.SSLContext | None):
    """A uvicorn server that leaves signals to us."""
    import uvicorn

    from lmdeploy.serve.connection import Connection

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        def leave(self, at_once: bool = False) -> None:
            self.should_exit = True
            self.force_exit = self.force_exit or at_once

    limits = context.limits
    most = min(limits.connections, max(1, descriptors(limits.connections + RESERVE) - RESERVE))
    connection = partial(Connection, Crowd(most, limits.address_connections), context.metrics)
    logging.getLogger('uvicorn.error').setLevel(logging.ERROR)
    config = uvicorn.Config(
        app, http=connection,  # type: ignore[arg-type]  # any callable will do
        ws='none', lifespan='off', log_config=None, access_log=False, server_header=False, proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=CLOSE_SECONDS, backlog=BACKLOG)
    config.load()
    config.ssl = tls
    return Server(config)


def _report(loop: asyncio.AbstractEventLoop, report: dict[str, Any]) -> None:
    if not is_starvation(report):
        loop.default_exception_handler(report)


async def _stats(meter: Meter, tell: Callable[[str], None]) -> None:
    """Every ten seconds a line, if anything happened in them."""
    while True:
        start = time.monotonic()
        await asyncio.sleep(STATS_SECONDS)
        line = meter(time.monotonic() - start)
        if line:
            tell(line)

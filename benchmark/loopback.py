"""What measurements of the server share: a server on a loopback port, and a client that notes when what came.

Linux only: processes are looked at in /proc.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE = re.compile(r'^lmdeploy:(\w+?)(?:_total)?(?:\{([^}]*)\})? (\S+)$', re.MULTILINE)
START_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident MiB of the server's process and of the engine's."""

    server: float
    engine: float

    @classmethod
    def of(cls, server: int, engine: int) -> Memory:
        return cls(resident(server), resident(engine))


def resident(pid: int) -> float:
    """MiB of memory that a process has."""
    for line in Path(f'/proc/{pid}/status').read_text().splitlines():
        if line.startswith('VmRSS:'):
            return int(line.split()[1]) / 1024
    return 0.0


def processor_seconds(pid: int) -> float:
    """Seconds of processor that all threads of a process have used."""
    fields = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def children(pid: int) -> list[int]:
    """The child processes of a process."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            parent = int(stat.read_text().rsplit(')', 1)[1].split()[1])
        except (OSError, IndexError):  # it has just ended
            continue
        if parent == pid:
            found.append(int(stat.parent.name))
    return found


class Server:
    """A running server; a context manager that ends it.

    Args:
        command: what starts it, without the interpreter; ``PORT`` in it becomes the port.
        log: where its output goes.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        with socket.create_server(('127.0.0.1', 0)) as free:
            self.port = free.getsockname()[1]
        self.log = log
        with log.open('wb') as output:
            self.process = subprocess.Popen(
                [sys.executable, *(word.replace('PORT', str(self.port)) for word in command)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        self.pid = self.process.pid

    def __enter__(self) -> Server:
        end = time.monotonic() + START_SECONDS
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f'the server did not start:\n{self.log.read_text(errors="replace")}')
            time.sleep(0.05)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def engine(self) -> int:
        """The process id of the engine."""
        for pid in children(self.pid):
            command = Path(f'/proc/{pid}/cmdline').read_bytes()
            if b'engine' in command:
                return pid
        raise RuntimeError('the server has no engine')

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; 0 where nothing answers."""
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=10)
        try:
            connection.request('GET', path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b''
        finally:
            connection.close()

    def ready(self) -> bool:
        return self.get('/ready')[0] == 200

    def model(self) -> str:
        """The name that requests give."""
        return json.loads(self.get('/v1/models')[1])['data'][0]['id']

    def metrics(self) -> Metrics:
        return Metrics.read(self.get('/metrics')[1].decode())

    def memory(self) -> Memory:
        return Memory.of(self.pid, self.engine)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@dataclass(frozen=True, slots=True)
class Metrics:
    """One scrape of ``/metrics``."""

    accepted: int
    finished: int
    failed: int
    cancelled: int
    in_flight: int
    used_blocks: float  # share of the KV cache
    running: int  # in the engine
    waiting: int
    statuses: dict[int, int]  # responses by HTTP status

    @classmethod
    def read(cls, text: str) -> Metrics:
        """From Prometheus' text form."""
        values: dict[str, float] = {}
        statuses: dict[int, int] = {}
        for name, labels, value in SAMPLE.findall(text):
            status = re.search(r'status="(\d+)"', labels)
            if name == 'http_responses' and status is not None:
                statuses[int(status[1])] = int(float(value))
            values[name] = float(value)
        counts = [int(values[f'requests_{name}']) for name in ('accepted', 'finished', 'failed', 'cancelled',
                                                               'in_flight')]
        return cls(*counts, values['gpu_cache_usage_perc'], int(values['num_requests_running']),
                   int(values['num_requests_waiting']), statuses)

    @property
    def adds_up(self) -> bool:
        return self.accepted == self.finished + self.failed + self.cancelled + self.in_flight

    @property
    def idle(self) -> bool:
        return not (self.in_flight or self.used_blocks or self.running or self.waiting)

    @property
    def server_errors(self) -> int:
        return sum(count for status, count in self.statuses.items() if status >= 500)


@dataclass(eq=False)
class Exchange(asyncio.Protocol):
    """One request on a connection of its own, and what came back.

    Attributes:
        head: status line and headers; ``body``: what follows, chunked as it came.
        times: of each event of a stream, on the clock of ``time.monotonic``.
        ended: the response is complete; ``lost``: the connection ended.
    """

    request: bytes
    sent: float = 0.0
    head: bytes = b''
    body: bytearray = field(default_factory=bytearray)
    times: list[float] = field(default_factory=list)
    ended: bool = False
    lost: bool = False
    transport: asyncio.Transport | None = None

    def __post_init__(self) -> None:
        self._length: int | None = None
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wanted = 0  # events that somebody waits for
        self._came: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.sent = time.monotonic()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if self._length is None:
            self.head += data
            head, found, data = self.head.partition(b'\r\n\r\n')
            if not found:
                return
            self.head = head
            length = re.search(rb'(?i)\r\ncontent-length: (\d+)', head)
            self._length = int(length[1]) if length is not None else -1
        start = max(len(self.body) - 1, 0)
        self.body += data
        events = self.body.count(b'\n\n', start)
        self.times += [now] * events
        if self._came is not None and len(self.times) >= self._wanted and not self._came.done():
            self._came.set_result(None)
        if len(self.body) == self._length if self._length >= 0 else self.body.endswith(b'\r\n0\r\n\r\n'):
            self.ended = True
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._finish()

    def _finish(self) -> None:
        for future in (self._done, self._came):
            if future is not None and not future.done():
                future.set_result(None)
        if self.transport is not None:
            self.transport.close()

    async def wait(self) -> None:
        """Until the response is complete or the connection is lost."""
        await self._done

    async def events(self, count: int) -> None:
        """Until so many events have come, or all."""
        if len(self.times) < count and not self._done.done():
            self._wanted, self._came = count, asyncio.get_running_loop().create_future()
            await self._came

    def leave(self) -> None:
        """Close the connection as a process does that is killed."""
        if self.transport is not None:
            self.transport.abort()

    @property
    def status(self) -> int:
        return int(self.head[9:12] or b'0')

    @property
    def complete(self) -> bool:
        """A stream with its finish reason and ``[DONE]``."""
        return self.ended and b'data: [DONE]\n\n' in self.body and re.search(
            rb'"finish_reason":"\w+"', self.body) is not None

    @property
    def error(self) -> str:
        """The code of the error that came as an answer or as the last event of a stream; empty: none."""
        found = re.findall(rb'"error":\{.*?"code":"(\w+)"', self.body)
        return found[-1].decode() if found else ''


def post(path: str, body: object) -> bytes:
    """A request as bytes."""
    data = json.dumps(body).encode()
    return (f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
            f'Content-Length: {len(data)}\r\n\r\n').encode() + data


async def start(port: int, request: bytes) -> Exchange:
    """Send a request; returns at once."""
    _, exchange = await asyncio.get_running_loop().create_connection(lambda: Exchange(request), '127.0.0.1', port)
    return exchange

"""Nodes that do as they are told, down to single bytes, and a proxy in front of them; all in one event loop."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from lmdeploy.serve.lifecycle import Watcher, bind
from lmdeploy.serve.proxy.context import ProxyContext, ProxyKeys
from lmdeploy.serve.proxy.service import run_proxy

NODE_KEY = 'node-key-of-the-tests'
NODE_AUTH = {'authorization': f'Bearer {NODE_KEY}'}
MODEL = 'toy'
CHAT = {'model': MODEL, 'messages': [{'role': 'user', 'content': 'hello'}]}
EVENTS = b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n'


@dataclass
class Asked:
    """A request as the node got it."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


Answer = Callable[['FakeNode', Asked, asyncio.StreamWriter], Awaitable[None]]


def whole(body: bytes, status: str = '200 OK', *headers: str) -> bytes:
    """A response with a length."""
    more = ''.join(f'{line}\r\n' for line in headers)
    head = f'HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n'
    return head.encode() + body


def piece(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b'%x\r\n%s\r\n' % (len(data), data)


async def answer_ok(node: FakeNode, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """Three events, or one object with the node's name."""
    if b'"stream":true' in asked.body.replace(b' ', b''):
        writer.write(EVENTS)
        for i in range(3):
            writer.write(piece(f'data: {{"node": "{node.name}", "i": {i}}}\n\n'.encode()))
            await writer.drain()
        writer.write(piece(b'data: [DONE]\n\n') + piece(b''))
    else:
        writer.write(whole(json.dumps({'node': node.name}).encode()))


async def die(node: FakeNode, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """The end of a killed process: a reset, without a byte."""
    writer.transport.abort()


@dataclass
class FakeNode:
    """A server on a loopback port that answers /health and /v1/models, and everything else as ``answer`` does."""

    name: str = 'a'
    answer: Answer = answer_ok
    health: bytes = whole(b'{}')
    models: tuple[str, ...] = (MODEL,)
    asked: list[Asked] = field(default_factory=list)
    gone: int = 0  # clients that left while they were answered
    port: int = 0
    tls: ssl.SSLContext | None = None
    host: str = '127.0.0.1'

    @property
    def url(self) -> str:
        return f'{"http" if self.tls is None else "https"}://{self.host}:{self.port}'

    @asynccontextmanager
    async def run(self) -> AsyncIterator[FakeNode]:
        server = await asyncio.start_server(self._connection, '127.0.0.1', self.port, ssl=self.tls)
        self.port = server.sockets[0].getsockname()[1]
        self._tasks: set[asyncio.Task] = set()
        try:
            yield self
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while True:
                asked = await self._read(reader)
                if asked.path == '/health':
                    writer.write(self.health)
                elif asked.path == '/v1/models':
                    writer.write(whole(json.dumps({'data': [{'id': name} for name in self.models]}).encode()))
                else:
                    self.asked.append(asked)
                    await self._watched(asked, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:  # not raised again: Python 3.11 prints it
            writer.transport.abort()
        finally:
            writer.close()

    async def _watched(self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer, and notice a client that goes away meanwhile."""
        answer = asyncio.ensure_future(self.answer(self, asked, writer))
        left = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ConnectionResetError
            answer.result()
        except ConnectionError:
            self.gone += 1
            raise
        finally:
            answer.cancel()
            left.cancel()
            await asyncio.gather(answer, left, return_exceptions=True)

    async def _read(self, reader: asyncio.StreamReader) -> Asked:
        head = (await reader.readuntil(b'\r\n\r\n')).decode('latin-1').split('\r\n')[:-2]
        method, path, _ = head[0].split(' ')
        headers = [(name.lower(), value) for name, value in (line.split(': ', 1) for line in head[1:])]
        size = next((int(value) for name, value in headers if name == 'content-length'), 0)
        return Asked(method, path, headers, await reader.readexactly(size))


@dataclass
class Running:
    """A proxy that listens."""

    context: ProxyContext
    url: str
    http: httpx.AsyncClient
    stop: asyncio.Event

    async def join(self, *nodes: FakeNode, **more: object) -> None:
        for node in nodes:
            body = {'url': node.url, 'status': {'models': list(node.models)}, **more}
            answer = await self.http.post('/nodes/add', json=body, headers=NODE_AUTH)
            assert answer.status_code == 200, answer.text

    async def status(self) -> dict:
        return (await self.http.get('/nodes/status', headers=NODE_AUTH)).json()

    async def settled(self) -> None:
        """Wait until nothing is under way, and check that nothing is lost."""
        for _ in range(200):
            if not self.context.metrics.in_flight and not any(node.unfinished for node in self.context.nodes):
                break
            await asyncio.sleep(0.01)
        assert [node.unfinished for node in self.context.nodes] == [0] * len(self.context.nodes)
        assert self.context.metrics.in_flight == self.context.admission.running == 0
        self.context.metrics.check()


@asynccontextmanager
async def proxy(api_keys: tuple[str, ...] = (), **fields) -> AsyncIterator[Running]:
    """A proxy with these fields of its context."""
    context = ProxyContext(ProxyKeys(api_keys, NODE_KEY), **{'heartbeat_seconds': 0.5, 'check_host': True, **fields})
    stop, ready = asyncio.Event(), asyncio.Event()
    watcher = Watcher(ready=ready.set, stats=lambda line: None, draining=lambda: None)
    sock = bind('127.0.0.1', 0)
    url = f'http://127.0.0.1:{sock.getsockname()[1]}'
    task = asyncio.ensure_future(run_proxy(context, sock, watcher, drain_seconds=5.0, stop=stop))
    try:
        await asyncio.wait_for(ready.wait(), 10)
        async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as http:
            yield Running(context, url, http, stop)
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)
        sock.close()
        context.metrics.check()


def run(main: Awaitable[None]) -> None:
    """A test in an event loop of its own."""
    async def within() -> None:
        await asyncio.wait_for(main, 40)

    asyncio.run(within())

"""Streams over bare ASGI: clients that go away, readers that are slow, errors after the first byte."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.sse import Writer, error_event, event
from tests.serve.fake_server import CHAT, events

URL = '/v1/chat/completions'
LONG = CHAT | {'max_tokens': 200, 'ignore_eos': True}


class Connection:
    """A client on bare ASGI that can leave, or stop reading, at any moment."""

    def __init__(self, server, body: dict, path: str = URL) -> None:
        self.left = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self.sent: list[dict] = []
        self.dropped = False
        self._body = json.dumps(body).encode()
        self._asked = False
        scope = {'type': 'http', 'method': 'POST', 'path': path, 'client': ('127.0.0.1', 1),
                 'headers': [(b'host', b'127.0.0.1'), (b'content-type', b'application/json')],
                 'extensions': {'lmdeploy.abort': self._drop}}
        self.task = asyncio.ensure_future(server.app(scope, self._receive, self._send))

    async def _receive(self):
        if not self._asked:
            self._asked = True
            return {'type': 'http.request', 'body': self._body, 'more_body': False}
        await self.left.wait()
        return {'type': 'http.disconnect'}

    def _drop(self) -> None:
        self.dropped = True

    async def _send(self, message):
        await self.reading.wait()
        self.sent.append(message)

    @property
    def text(self) -> str:
        return b''.join(m.get('body', b'') for m in self.sent).decode()

    @property
    def ended(self) -> bool:
        return bool(self.sent) and self.sent[-1]['type'] == 'http.response.body' and not self.sent[-1].get('more_body')

    async def until(self, events: int) -> None:
        while self.text.count('data: ') < events:
            await asyncio.sleep(0.002)


async def freed(server, seconds: float = 1.0) -> None:
    end = time.monotonic() + seconds
    while (stats := server.client.stats()).in_flight or stats.used_blocks or server.context.running:
        assert time.monotonic() < end, stats
        await asyncio.sleep(0.005)


def run(main):
    asyncio.run(asyncio.wait_for(main, 30))


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('n', [1, 3])
def test_a_client_that_leaves_ends_its_request_at_once(serve, stream, n):
    server = serve(step_seconds=0.005)

    async def main():
        connection = Connection(server, LONG | {'stream': stream, 'n': n})
        if stream:
            await connection.until(4)
        else:
            await asyncio.sleep(0.1)
        assert server.client.stats().in_flight == n
        connection.left.set()
        await asyncio.wait_for(connection.task, 1)
        await freed(server)
        assert not connection.ended

    run(main())
    metrics = server.context.metrics
    assert (metrics.accepted, metrics.cancelled, metrics.in_flight) == (1, 1, 0)
    assert server.context.admission.running == server.context.admission.queued == 0
    assert server.client.stats().output_tokens < 200 * n


def test_clients_that_leave_at_any_moment_leave_nothing_behind(serve):
    server = serve(step_seconds=0.001, max_batch_size=4, max_concurrent_requests=6)

    async def main():
        connections = []
        for i in range(60):
            connections.append(Connection(server, LONG | {'stream': i % 2 == 0, 'n': 1 + i % 3}))
            await asyncio.sleep(0.0007 * (i % 5))
            if i >= 8:
                connections[i - 8].left.set()
        for connection in connections:
            connection.left.set()
        await asyncio.gather(*(connection.task for connection in connections))
        await freed(server)

    run(main())
    assert server.context.admission.running == server.context.admission.queued == 0
    server.context.metrics.check()
    assert server.post(URL, CHAT).status_code == 200


def test_a_client_that_leaves_while_it_waits_costs_no_step(serve):
    server = serve(step_seconds=0.005, max_concurrent_requests=1)

    async def main():
        first = Connection(server, LONG | {'stream': True})
        await first.until(2)
        second = Connection(server, LONG)
        await asyncio.sleep(0.05)
        assert server.context.admission.queued == 1 and server.client.stats().accepted == 1
        second.left.set()
        await asyncio.wait_for(second.task, 1)
        assert server.context.admission.queued == 0 and server.client.stats().accepted == 1
        first.left.set()
        await first.task
        await freed(server)

    run(main())


def test_a_reader_that_stops_is_given_up_and_nobody_else_notices(serve):
    server = serve(step_seconds=0.002, limits=Limits(stream_bytes=3000))

    async def main():
        slow = Connection(server, LONG | {'stream': True})
        await slow.until(3)
        slow.reading.clear()
        good = Connection(server, LONG | {'stream': True})
        await asyncio.wait_for(good.task, 10)
        assert good.ended and good.text.endswith('data: [DONE]\n\n')
        await asyncio.wait_for(slow.task, 5)
        await freed(server)
        assert slow.dropped and not slow.ended and '[DONE]' not in slow.text
        assert not good.dropped

    run(main())
    metrics = server.context.metrics
    assert (metrics.finished, metrics.failed + metrics.cancelled) == (1, 1)


def test_a_reader_that_takes_nothing_for_too_long_is_given_up(serve):
    server = serve(step_seconds=0.01, limits=Limits(stall_seconds=1))

    async def main():
        slow = Connection(server, LONG | {'stream': True, 'max_tokens': 230})
        await slow.until(3)
        slow.reading.clear()
        start = time.monotonic()
        await asyncio.wait_for(slow.task, 5)
        assert 0.8 < time.monotonic() - start < 4
        await freed(server)

    run(main())


def test_chunks_that_pile_up_go_out_together_and_whole():
    async def main():
        gate, sent = asyncio.Event(), []

        async def send(message):
            await gate.wait()
            sent.append(message['body'])

        writer = Writer(send, Limits(stream_bytes=1000))
        for i in range(50):
            writer.write(b'%03d ' % i)
            if i == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        gate.set()
        await writer.finish()
        assert b''.join(sent) == b''.join(b'%03d ' % i for i in range(50)) and len(sent) <= 2
        gate.clear()
        writer = Writer(send, Limits(stream_bytes=1000))
        writer.write(b'x' * 900)
        await asyncio.sleep(0.01)
        writer.write(b'y' * 900)
        with pytest.raises(HttpError, match='LMD-523'):
            writer.write(b'z' * 900)
        await writer.close()

    run(main())


def test_a_deadline_ends_a_stream_with_an_error_and_no_done(serve):
    server = serve(step_seconds=0.02, limits=Limits(request_seconds=1))

    async def main():
        connection = Connection(server, LONG | {'stream': True})
        await asyncio.wait_for(connection.task, 5)
        *_, last = events(connection.text)
        assert connection.ended and last['error']['code'] == 'deadline_exceeded'
        whole = Connection(server, LONG)
        await asyncio.wait_for(whole.task, 5)
        assert whole.sent[0]['status'] == 504
        await freed(server)

    run(main())
    assert server.context.metrics.cancelled == 2 and not server.context.metrics.rejected


def test_events_are_one_line_of_json():
    assert event({'a': 'x\ny\u2028ü'}) == 'data: {"a":"x\\ny\u2028ü"}\n\n'.encode()
    assert error_event(ValueError('secret'), 'id').startswith(b'data: {"error":{"message":')
    assert b'secret' not in error_event(ValueError('secret'), 'id')

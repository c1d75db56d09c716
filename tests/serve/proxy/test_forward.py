"""A request's way through: to one node, to another if that fails in time, and back byte for byte."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from contextlib import AsyncExitStack

import openai
import pytest

from lmdeploy.serve.limits import Limits
from lmdeploy.serve.listener import RESERVE
from lmdeploy.serve.proxy.service import affordable
from tests.serve.proxy.fakes import (
    CHAT,
    EVENTS,
    MODEL,
    NODE_AUTH,
    FakeNode,
    answer_ok,
    die,
    piece,
    proxy,
    run,
    whole,
)

STREAM = CHAT | {'stream': True}
PATH = '/v1/chat/completions'


def test_the_answer_comes_back_as_it_is():
    body = b'{"a":  1, "text": "\xe4\xbd\xa0\xe5\xa5\xbd"}\n'

    async def answer(node, asked, writer):
        writer.write(whole(body, '418 Teapot', 'X-Mine: 1', 'Retry-After: 7', 'Set-Cookie: a=b', 'Server: x',
                           'Connection: X-Hop', 'X-Hop: 1', 'X-Request-Id: other'))

    async def main():
        async with FakeNode(answer=answer).run() as node, proxy() as running:
            await running.join(node)
            sent = json.dumps(CHAT, indent=3).encode()
            found = await running.http.post(PATH, content=sent, headers={'content-type': 'application/json',
                                                                         'x-request-id': 'mine'})
            assert (found.status_code, found.content) == (418, body)
            assert found.headers.get_list('x-request-id') == ['mine']
            assert found.headers['x-mine'] == '1' and found.headers['retry-after'] == '7'
            assert not {'set-cookie', 'server', 'x-hop'} & set(found.headers)
            [asked] = node.asked
            assert (asked.method, asked.path, asked.body) == ('POST', PATH, sent)
            assert asked.header('x-request-id') == 'mine'
            await running.settled()

    run(main())


def test_a_stream_passes_unbuffered_and_byte_for_byte():
    sent = [b': comment\n\n', 'data: {"text": "你"}\n\n'.encode(), b'event: x\r\ndata: 1\r\ndata: 2\r\n\r\n',
            b'data: [DONE]\n\n']

    async def answer(node, asked, writer):
        writer.write(EVENTS)
        for data in sent:
            writer.write(piece(data))
            await asyncio.sleep(0.15)
        writer.write(piece(b''))

    async def main():
        async with FakeNode(answer=answer).run() as node, proxy() as running:
            await running.join(node)
            found, times = [], []
            async with running.http.stream('POST', PATH, json=STREAM) as stream:
                assert stream.headers['content-type'] == 'text/event-stream; charset=utf-8'
                async for data in stream.aiter_raw():
                    found.append(data)
                    times.append(time.monotonic())
            assert found == sent
            assert all(0.08 < b - a < 0.4 for a, b in zip(times, times[1:])), times

    run(main())


async def headers_only(node, asked, writer):
    writer.write(EVENTS)
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


@pytest.mark.parametrize('kind', [die, headers_only])
@pytest.mark.parametrize('stream', [False, True])
def test_a_node_that_dies_before_the_first_byte_is_replaced(stream, kind):
    async def main():
        async with AsyncExitStack() as stack:
            running = await stack.enter_async_context(proxy(heartbeat_seconds=100, chance=random.Random(1)))
            bad = [await stack.enter_async_context(FakeNode('dead', kind).run())]
            good = await stack.enter_async_context(FakeNode('good').run())
            await running.join(*bad, good)
            for _ in range(20):
                found = await running.http.post(PATH, json=STREAM if stream else CHAT)
                assert found.status_code == 200 and 'good' in found.text and 'dead' not in found.text
            assert len(good.asked) == 20 and [len(node.asked) for node in bad] == [3]
            status = await running.status()
            assert [status[node.url]['up'] for node in (*bad, good)] == [False, True]
            assert running.context.metrics.retries['failed'] == 3
            await running.settled()

    run(main())


def test_a_request_that_kills_two_nodes_is_sent_to_no_third():
    async def main():
        async with AsyncExitStack() as stack:
            running = await stack.enter_async_context(proxy(heartbeat_seconds=100))
            nodes = [await stack.enter_async_context(FakeNode(answer=die).run()) for _ in range(4)]
            await running.join(*nodes)
            found = await running.http.post(PATH, json=CHAT)
            assert (found.status_code, found.json()['error']['code']) == (502, 'node_failed')
            assert sum(len(node.asked) for node in nodes) == 2
            assert all(node['up'] for node in (await running.status()).values())

    run(main())


def test_nodes_that_are_not_there_cost_no_request():
    async def main():
        async with FakeNode('good').run() as good, proxy(heartbeat_seconds=100) as running:
            for _ in range(3):
                async with FakeNode().run() as gone:
                    await running.join(gone)
            await running.join(good)
            for _ in range(6):
                assert (await running.http.post(PATH, json=CHAT)).json() == {'node': 'good'}
            assert [node['up'] for node in (await running.status()).values()].count(True) >= 1

    run(main())


def test_when_all_nodes_fail_the_error_says_so():
    async def main():
        async with FakeNode(answer=die).run() as node, proxy(heartbeat_seconds=100) as running:
            await running.join(node)
            found = await running.http.post(PATH, json=CHAT)
            assert found.status_code == 502 and found.json()['error']['code'] == 'node_failed'
            assert len(node.asked) == 1  # the same node is not asked twice
            await running.settled()

    run(main())


@pytest.mark.parametrize('half', [b'', b'data: {"text": "br'])
def test_a_node_that_dies_in_the_middle_ends_the_stream_with_an_error(half):
    """As a whole event, after whole events, and without [DONE]."""
    async def answer(node, asked, writer):
        writer.write(EVENTS + piece(b'data: {"i": 0}\n\n'))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(piece(half) if half else b'')
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async def main():
        async with FakeNode(answer=answer).run() as node, FakeNode('other').run() as other, proxy() as running:
            await running.join(node)
            found = await running.http.post(PATH, json=STREAM)
            assert found.status_code == 200
            first, last, rest = found.text.split('\n\n')
            assert (first, rest) == ('data: {"i": 0}', '')
            assert json.loads(last.removeprefix('data: '))['error']['code'] == 'node_failed'
            message = await running.http.post('/v1/messages', json=STREAM)
            assert message.text.split('\n\n')[1].startswith('event: error\ndata: {"error":{"type":"api_error"')
            assert other.asked == []
            async with openai.AsyncOpenAI(api_key='x', base_url=f'{running.url}/v1', max_retries=0) as client:
                stream = await client.chat.completions.create(**STREAM)
                with pytest.raises(openai.APIError, match='broke off'):
                    async for _ in stream:
                        pass
            await running.settled()
            assert running.context.metrics.failed == 3

    run(main())


def test_a_whole_answer_that_breaks_off_drops_the_connection():
    async def answer(node, asked, writer):
        writer.write(whole(b'x' * 1000)[:-500])
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async def main():
        import httpx

        async with FakeNode(answer=answer).run() as node, proxy() as running:
            await running.join(node)
            with pytest.raises(httpx.HTTPError):
                await running.http.post(PATH, json=CHAT)
            await running.settled()

    run(main())


def test_a_busy_node_is_passed_over_and_the_last_one_s_word_counts():
    async def busy(node, asked, writer):
        writer.write(whole(b'{"error": "busy"}', '503 Busy', 'Retry-After: 11'))

    async def main():
        async with FakeNode('a', busy).run() as a, FakeNode('b', busy).run() as b, proxy() as running:
            await running.join(a, b)
            found = await running.http.post(PATH, json=CHAT)
            assert (found.status_code, found.headers['retry-after']) == (503, '11') and b'busy' in found.content
            assert len(a.asked) == len(b.asked) == 1
            b.answer = answer_ok
            for _ in range(5):
                assert (await running.http.post(PATH, json=CHAT)).json() == {'node': 'b'}
            assert (await running.status())[a.url]['up']
            await running.settled()

    run(main())


@pytest.mark.parametrize('status', ['302 Found', '401 Unauthorized', '403 Forbidden'])
def test_a_node_that_sends_elsewhere_or_refuses_the_proxy_is_no_answer(status):
    async def answer(node, asked, writer):
        writer.write(whole(b'{}', status, f'Location: {other_url[0]}/secret'))

    other_url = ['']

    async def main():
        async with FakeNode(answer=answer).run() as node, FakeNode('other').run() as other, proxy() as running:
            other_url[0] = other.url
            await running.join(node)
            found = await running.http.post(PATH, json=CHAT)
            assert found.status_code == 502 and 'location' not in found.headers
            assert other.asked == []

    run(main())


OK = b'HTTP/1.1 200 OK\r\n'
GARBAGE = [b'garbage\r\n\r\n', b'HTTP/1.1 abc\r\n\r\n', b'\x16\x03\x01\x02\x00', OK + b'Content-Length: x\r\n\r\n',
           OK + b'Content-Length: 1\r\nContent-Length: 2\r\n\r\nab', OK + b'A: b\r\n' * 30000]


@pytest.mark.parametrize('data', GARBAGE, ids=range(len(GARBAGE)))
def test_a_node_that_speaks_nonsense(data):
    async def answer(node, asked, writer):
        writer.write(data)
        await writer.drain()
        writer.close()

    async def main():
        async with FakeNode(answer=answer).run() as node, FakeNode('good').run() as good, proxy() as running:
            await running.join(node, good)
            for _ in range(4):
                found = await running.http.post(PATH, json=CHAT)
                assert (found.status_code, found.json()) == (200, {'node': 'good'})

    run(main())


def test_a_client_that_leaves_is_noticed_by_the_node():
    """In the middle of a stream, and before the first byte."""
    async def forever(node, asked, writer):
        if b'silent' not in asked.body:
            writer.write(EVENTS)
        while b'silent' in asked.body:
            await asyncio.sleep(1)
        while True:
            writer.write(piece(b'data: x\n\n'))
            await writer.drain()
            await asyncio.sleep(0.02)

    async def main():
        async with FakeNode(answer=forever).run() as node, proxy() as running:
            await running.join(node)
            async with running.http.stream('POST', PATH, json=STREAM) as stream:
                await anext(stream.aiter_raw())
            await _soon(lambda: node.gone == 1)
            task = asyncio.ensure_future(running.http.post(PATH, json=CHAT | {'user': 'silent'}))
            await _soon(lambda: len(node.asked) == 2)
            task.cancel()
            await _soon(lambda: node.gone == 2)
            await running.settled()
            assert running.context.metrics.cancelled == 2

    run(main())


async def _soon(true, seconds: float = 1.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def test_a_silent_node_is_given_up():
    """A stream after the time limit, without a second try: the node may be at work on it."""
    async def silent(node, asked, writer):
        if b'begin' in asked.body:
            writer.write(EVENTS + piece(b'data: 1\n\n'))
            await writer.drain()
        await asyncio.sleep(30)

    async def main():
        async with FakeNode(answer=silent).run() as node, proxy(silence_seconds=0.3) as running:
            await running.join(node)
            found = await running.http.post(PATH, json=STREAM)
            assert (found.status_code, found.json()['error']['code']) == (504, 'node_timeout')
            found = await running.http.post(PATH, json=STREAM | {'user': 'begin'})
            assert found.status_code == 200 and '"node_timeout"' in found.text.split('\n\n')[1]
            await _soon(lambda: node.gone == 2)
            found = await running.http.post(PATH, json=CHAT, headers={'x-request-timeout': '0.4'})
            assert (found.status_code, found.json()['error']['code']) == (504, 'deadline_exceeded')
            await running.settled()

    run(main())


def test_a_reader_that_takes_nothing_is_bounded_and_given_up():
    """The node is held back meanwhile: what waits in the proxy does not grow."""
    sent = [0]

    async def flood(node, asked, writer):
        writer.write(EVENTS)
        while True:
            writer.write(piece(b'data: ' + b'x' * 10000 + b'\n\n'))
            await writer.drain()
            sent[0] += 10000

    async def main():
        async with FakeNode(answer=flood).run() as node, proxy(limits=Limits(stall_seconds=1)) as running:
            await running.join(node)
            reader, writer = await asyncio.open_connection('127.0.0.1', int(running.url.rsplit(':', 1)[1]), limit=1024)
            body = json.dumps(STREAM).encode()
            writer.write(b'POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                         b'Content-Length: %d\r\n\r\n' % (PATH.encode(), len(body)) + body)
            await _soon(lambda: node.gone == 1, 10)
            assert sent[0] < 30_000_000  # what kernels buffer on loopback
            await running.settled()
            writer.close()

    run(main())


def test_a_large_answer_passes_whole_however_slowly_it_is_read():
    body = bytes(range(256)) * (16 << 10)

    async def answer(node, asked, writer):
        writer.write(whole(body))
        await writer.drain()

    async def main():
        async with FakeNode(answer=answer).run() as node, proxy() as running:
            await running.join(node)
            found = b''
            async with running.http.stream('POST', PATH, json=CHAT) as stream:
                async for data in stream.aiter_raw():
                    found += data
                    await asyncio.sleep(0.002)
            assert found == body

    run(main())


def test_large_events_pass_a_slow_reader():
    """Larger than all that may wait, and read in drops: nothing is lost, and nobody is given up."""
    event = b'data: ' + b'x' * 200_000 + b'\n\n'

    async def answer(node, asked, writer):
        writer.write(EVENTS)
        for _ in range(8):
            writer.write(piece(event))
            await writer.drain()
        writer.write(piece(b''))

    async def main():
        async with FakeNode(answer=answer).run() as node, proxy(limits=Limits(stream_bytes=50_000)) as running:
            await running.join(node)
            found = b''
            async with running.http.stream('POST', PATH, json=STREAM) as stream:
                async for data in stream.aiter_raw():
                    found += data
                    await asyncio.sleep(0.005)
            assert found == event * 8

    run(main())


def test_many_streams_under_a_node_that_is_killed():
    """Every client gets a whole answer or an error that says so; all counts return to zero."""
    async def slow(node, asked, writer):
        writer.write(EVENTS)
        for i in range(20):
            writer.write(piece(b'data: {"i": %d}\n\n' % i))
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.write(piece(b'data: [DONE]\n\n') + piece(b''))

    async def main():
        async with FakeNode('b', slow).run() as b, proxy() as running:
            async with FakeNode('a', slow).run() as a:
                await running.join(a, b)
                tasks = [asyncio.ensure_future(running.http.post(PATH, json=STREAM)) for _ in range(60)]
                await _soon(lambda: len(a.asked) + len(b.asked) == 60, 5)
                await asyncio.sleep(0.1)
            found = [answer.text for answer in await asyncio.gather(*tasks)]
            assert len(a.asked) == len(b.asked) == 30
            ends = [text.endswith('data: [DONE]\n\n') for text in found]
            assert 30 <= ends.count(True) < 60  # those that had got nothing yet have moved
            assert all(end or '"code":"node_failed"' in text.split('\n\n')[-2] for text, end in zip(found, ends))
            await running.settled()

    run(main())


def test_a_drain_lets_streams_finish():
    async def slow(node, asked, writer):
        writer.write(EVENTS)
        for _ in range(10):
            writer.write(piece(b'data: x\n\n'))
            await writer.drain()
            await asyncio.sleep(0.05)
        writer.write(piece(b'data: [DONE]\n\n') + piece(b''))

    async def main():
        async with FakeNode(answer=slow).run() as node, proxy() as running:
            await running.join(node)
            tasks = [asyncio.ensure_future(running.http.post(PATH, json=STREAM)) for _ in range(8)]
            await _soon(lambda: len(node.asked) == 8)
            running.stop.set()
            await _soon(lambda: running.context.draining)
            turned = await running.http.post(PATH, json=CHAT)
            assert (turned.status_code, turned.headers['retry-after']) == (503, '5')
            assert (await running.http.get('/ready')).status_code == 503
            refused = await running.http.post('/nodes/add', json={'url': node.url}, headers=NODE_AUTH)
            assert refused.status_code == 503
            assert all(answer.text.endswith('data: [DONE]\n\n') for answer in await asyncio.gather(*tasks))

    run(main())


def test_a_reset_of_the_client_cancels_at_once():
    async def forever(node, asked, writer):
        writer.write(EVENTS + piece(b'data: x\n\n'))
        await asyncio.sleep(30)

    async def main():
        async with FakeNode(answer=forever).run() as node, proxy() as running:
            await running.join(node)
            body = json.dumps(STREAM | {'model': MODEL}).encode()
            sock = socket.create_connection(('127.0.0.1', int(running.url.rsplit(':', 1)[1])))
            sock.sendall(b'POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                         b'Content-Length: %d\r\n\r\n' % (PATH.encode(), len(body)) + body)
            await _soon(lambda: len(node.asked) == 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            sock.close()
            await _soon(lambda: node.gone == 1)
            await running.settled()

    run(main())


def test_a_proxy_without_descriptors_blames_no_node(monkeypatch):
    import errno

    import anyio

    async def no_socket(*args, **kwargs):
        raise OSError(errno.EMFILE, 'Too many open files')

    async def main():
        async with FakeNode().run() as node, proxy(heartbeat_seconds=0.1) as running:
            await running.join(node)
            monkeypatch.setattr(anyio, 'connect_tcp', no_socket)
            for _ in range(4):
                found = await running.http.post(PATH, json=CHAT)
                assert (found.status_code, found.json()['error']['code']) == (503, 'server_busy')
            await asyncio.sleep(0.5)
            monkeypatch.undo()
            assert (await running.status())[node.url]['failures'] == 0
            assert (await running.http.post(PATH, json=CHAT)).status_code == 200

    run(main())


def test_every_connection_has_room_for_one_to_a_node(monkeypatch):
    for found, wanted, allowed in ((10_000, 1024, 1024), (1024, 1024, (1024 - RESERVE) // 2), (10, 1024, 1)):
        monkeypatch.setattr('lmdeploy.serve.proxy.service.descriptors', lambda most, found=found: min(found, most))
        assert affordable(Limits(connections=wanted)).connections == allowed

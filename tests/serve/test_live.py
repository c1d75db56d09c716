"""Over TCP, with the clients that people use, and with clients that nobody should write."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx
import openai
import pytest
import requests

from lmdeploy.serve.auth import KeyRing
from lmdeploy.serve.limits import Limits
from tests.serve.fake_server import CHAT, MODEL
from tests.serve.live import live
from tests.serve.test_chat import SET_LIGHT
from tests.serve.test_edge import shape

MESSAGES = [{'role': 'system', 'content': 'You are a helpful assistant.'},
            {'role': 'user', 'content': ' provide three suggestions about time management'}]
LONG = {'model': MODEL, 'messages': MESSAGES, 'max_tokens': 100, 'extra_body': {'ignore_eos': True}}


@pytest.fixture
def keyed(serve):
    server = serve(keys=KeyRing(['token']), step_seconds=0.001, check_host=True)
    with live(server) as running:
        yield server, running


def client(running, key='token', kind=openai.OpenAI, host='127.0.0.1'):
    return kind(api_key=key, base_url=f'http://{host}:{running.port}/v1', timeout=20, max_retries=0)


@pytest.mark.parametrize('host', ['127.0.0.1', '0.0.0.0', 'localhost'])
def test_the_openai_client_answers_and_streams_alike(keyed, host):
    server, running = keyed
    api = client(running, host=host)
    name = api.models.list().data[0].id
    assert name == MODEL
    whole = api.chat.completions.create(model=name, messages=MESSAGES, temperature=0.8, top_p=0.8, max_tokens=20)
    assert whole.choices[0].message.role == 'assistant' and whole.usage.completion_tokens == 20
    chunks = list(api.chat.completions.create(model=name, messages=MESSAGES, max_tokens=20, stream=True, n=2,
                                              stream_options={'include_usage': True}))
    for index in range(2):
        text = ''.join(c.choices[0].delta.content or '' for c in chunks[:-1] if c.choices[0].index == index)
        assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 40 and chunks[-1].choices == []
    assert server.settled()


def test_the_openai_client_asynchronously(keyed):
    _, running = keyed

    async def main():
        async with client(running, kind=openai.AsyncOpenAI) as api:
            name = (await api.models.list()._get_page()).data[0].id
            answers = await asyncio.gather(*(
                api.chat.completions.create(model=name, messages=MESSAGES, max_tokens=10) for _ in range(12)))
            assert len({answer.choices[0].message.content for answer in answers}) == 1
            stream = await api.chat.completions.create(model=name, messages=MESSAGES, max_tokens=10, stream=True)
            text = ''.join([c.choices[0].delta.content or '' async for c in stream])
            assert text == answers[0].choices[0].message.content

    asyncio.run(main())


def test_the_openai_client_s_other_calls(keyed):
    pytest.importorskip('llguidance')
    _, running = keyed
    api = client(running)
    texts = api.completions.create(model=MODEL, prompt=['a', 'b'], max_tokens=4, n=2)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    vectors = api.embeddings.create(model=MODEL, input=['a', 'b'])
    assert len(vectors.data) == 2 and isinstance(vectors.data[0].embedding[0], float)
    called = api.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[SET_LIGHT], tool_choice='required',
                                         max_tokens=150)
    assert called.choices[0].message.tool_calls[0].function.name == 'set_light'
    shaped = api.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=60, response_format={
        'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': {'enum': ['red', 'green']}}})
    assert json.loads(shaped.choices[0].message.content) in ('red', 'green')


@pytest.mark.parametrize(('call', 'error'), [
    (lambda api: api.with_options(api_key='wrong').models.list(), openai.AuthenticationError),
    (lambda api: api.chat.completions.create(model='x', messages=MESSAGES), openai.NotFoundError),
    (lambda api: api.chat.completions.create(model=MODEL, messages=MESSAGES, n=0), openai.BadRequestError),
    (lambda api: api.chat.completions.create(model=MODEL, messages=MESSAGES, n=0, stream=True), openai.BadRequestError),
])
def test_the_openai_client_raises_its_own_errors(keyed, call, error):
    with pytest.raises(error) as caught:
        call(client(keyed[1]))
    assert caught.value.code and caught.value.body['message']


def test_requests(keyed):
    _, running = keyed
    url, headers = f'{running.url}/v1/chat/completions', {'Authorization': 'Bearer token'}
    data = {'model': MODEL, 'messages': [{'role': 'user', 'content': '你好'}]}
    answer = requests.post(url, headers=headers, json=data, timeout=20)
    assert isinstance(answer.json()['choices'][0]['message']['content'], str)
    assert requests.post(url, json=data, timeout=20).json()['detail']['error']['code'] == 'invalid_api_key'
    with requests.post(url, headers=headers, json=data | {'stream': True}, stream=True, timeout=20) as stream:
        assert list(stream.iter_lines())[-2] == b'data: [DONE]'


def test_chunks_arrive_one_by_one(serve):
    server = serve(step_seconds=0.02)
    with live(server) as running:
        times = [time.monotonic() for _ in client(running).chat.completions.create(**LONG | {'max_tokens': 20},
                                                                                  stream=True)]
    gaps = [b - a for a, b in zip(times, times[1:])]
    assert sum(gap > 0.01 for gap in gaps) > 10


def raw(running, data: bytes, seconds: float = 5.0) -> bytes:
    """What comes back for these bytes until the server closes, or nothing more comes."""
    with socket.create_connection(('127.0.0.1', running.port), timeout=seconds) as sock:
        sock.sendall(data)
        found = b''
        try:
            while piece := sock.recv(65536):
                found += piece
        except (TimeoutError, ConnectionResetError):
            pass
        return found


BAD_BYTES = [
    b'GARBAGE\r\n\r\n',
    b'GET /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello',
    b'POST /v1/encode HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n',
    b'POST /v1/encode HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n',
    b'GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n',
    b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03',
]


@pytest.mark.parametrize('data', BAD_BYTES, ids=range(len(BAD_BYTES)))
def test_malformed_requests_get_400_and_hurt_nobody(keyed, data):
    _, running = keyed
    found = raw(running, data, 1.0)
    assert found[:12] in (b'HTTP/1.1 400', b'HTTP/1.1 401', b'') and found.count(b'HTTP/1.1 2') == 0
    assert client(running).models.list().data


@pytest.mark.parametrize('target', [
    b'/v1/../v1/models', b'/%2e%2e/v1/models', b'http://127.0.0.1/v1/models', b'/v1/models?key=token', b'*',
    b'/health/../v1/models', b'/health%2f..%2fv1/models', b'//v1/models', b'/v1/%6dodels'])
def test_no_spelling_of_a_path_avoids_the_key(keyed, target):
    _, running = keyed
    found = raw(running, b'GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' % target, 2.0)
    assert found.startswith((b'HTTP/1.1 401', b'HTTP/1.1 400')), found[:100]


def test_an_endless_header_is_cut_off(keyed):
    _, running = keyed
    begun = b'GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: '
    assert raw(running, begun + b'a' * 100_000 + b'\r\n\r\n', 2.0).startswith(b'HTTP/1.1 431')
    with socket.create_connection(('127.0.0.1', running.port), timeout=5) as sock:
        with pytest.raises(OSError):
            sock.sendall(begun)
            for i in range(300):
                sock.sendall(b'a' * 10_000 + b'\r\nX%d: ' % i)
                time.sleep(0.0005)


def test_a_header_that_does_not_come_is_given_up(keyed, monkeypatch):
    monkeypatch.setattr('lmdeploy.serve.connection.HEADER_SECONDS', 0.3)
    _, running = keyed
    for data in (b'', b'GET /v1/models HTTP/1.1\r\nHost: loc'):
        start = time.monotonic()
        assert raw(running, data, 5.0) == b''
        assert time.monotonic() - start < 3


def test_connections_are_limited(serve):
    server = serve(limits=Limits(connections=5))
    with live(server) as running:
        held = [socket.create_connection(('127.0.0.1', running.port)) for _ in range(6)]
        time.sleep(0.1)
        refused = requests.get(f'{running.url}/health', timeout=5)
        shape(refused, 503, 'too_many_connections', request_id=False)
        assert refused.headers['connection'] == 'close' and refused.headers['retry-after'] == '1'
        assert server.context.metrics.rejected['too_many_connections'] == 1
        assert held[5].recv(1) == b''  # one that asks nothing is closed, too
        for sock in held:
            sock.close()
        time.sleep(0.1)
        assert requests.get(f'{running.url}/health', timeout=5).status_code == 200


def test_connections_of_one_address_are_limited(serve):
    server = serve(limits=Limits(address_connections=3))
    with live(server) as running:
        held = [socket.create_connection(('127.0.0.1', running.port)) for _ in range(3)]
        time.sleep(0.1)
        shape(requests.get(f'{running.url}/health', timeout=5), 429, 'too_many_connections', request_id=False)
        with socket.create_connection(('127.0.0.1', running.port), source_address=('127.0.0.2', 0)) as other:
            other.sendall(b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n')
            assert other.recv(100).startswith(b'HTTP/1.1 200')
        for sock in held:
            sock.close()
        time.sleep(0.1)
        assert requests.get(f'{running.url}/health', timeout=5).status_code == 200


def start_stream(running, **change) -> socket.socket:
    """A stream that has begun; only its first bytes were read."""
    body = json.dumps(CHAT | {'stream': True, 'max_tokens': 200, 'ignore_eos': True} | change).encode()
    sock = socket.create_connection(('127.0.0.1', running.port), timeout=10)
    sock.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                 b'Content-Length: %d\r\n\r\n' % len(body) + body)
    assert sock.recv(100).startswith(b'HTTP/1.1 200')
    return sock


def test_a_client_with_many_streams_that_dies_frees_all_its_blocks(serve):
    server = serve(step_seconds=0.01, max_batch_size=32, num_blocks=800)
    with live(server) as running:
        streams = [start_stream(running) for _ in range(32)]
        assert server.client.stats().in_flight == 32
        for sock in streams:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')  # a reset, as of a killed process
            sock.close()
        end = time.monotonic() + 1.0
        while server.client.stats().used_blocks or server.context.running:
            assert time.monotonic() < end, server.client.stats()
            time.sleep(0.01)
    assert server.context.metrics.cancelled == 32


def test_a_drain_lets_streams_finish_and_turns_others_away(serve):
    server = serve(step_seconds=0.005, max_batch_size=16, num_blocks=400)
    with live(server, drain_seconds=20) as running:
        streams = [start_stream(running, max_tokens=100) for _ in range(16)]
        running.stop()
        time.sleep(0.1)
        assert requests.get(f'{running.url}/ready', timeout=5).status_code == 503
        turned = requests.post(f'{running.url}/v1/chat/completions', json=CHAT, timeout=5)
        assert turned.status_code == 503 and turned.json()['error']['code'] == 'shutting_down'
        for sock in streams:
            found = b''
            while not found.endswith(b'0\r\n\r\n'):
                piece = sock.recv(65536)
                assert piece, 'truncated'
                found += piece
            assert b'data: [DONE]' in found
            sock.close()
        running.thread.join(10)
        assert not running.thread.is_alive()
    assert server.context.metrics.finished == 16 and running.told == ['draining']


def test_a_drain_that_takes_too_long_ends_streams_with_an_error(serve):
    server = serve(step_seconds=0.02)
    with live(server, drain_seconds=0.3) as running:
        sock = start_stream(running, max_tokens=230)
        start = time.monotonic()
        running.stop()
        found = b''
        while piece := sock.recv(65536):
            found += piece
        assert b'"code":"shutting_down"' in found and b'[DONE]' not in found
        running.thread.join(10)
        assert time.monotonic() - start < 5
    assert server.context.metrics.cancelled == 1


def test_a_crowd_of_clients_that_stream_wait_and_leave_loses_nothing(serve):
    server = serve(step_seconds=0.0005, max_batch_size=16, num_blocks=300)
    outcomes: list[str] = []

    async def one(http: httpx.AsyncClient, i: int) -> None:
        body = CHAT | {'max_tokens': 1 + i % 40, 'ignore_eos': True, 'stream': i % 3 == 0, 'n': 1 + (i % 7 == 0)}
        if i % 10 == 9:
            try:
                await asyncio.wait_for(http.post('/v1/chat/completions', json=body | {'max_tokens': 200}), 0.02)
            except (asyncio.TimeoutError, httpx.HTTPError):
                outcomes.append('left')
            return
        answer = await http.post('/v1/chat/completions', json=body)
        assert answer.status_code == 200
        if body['stream']:
            assert answer.text.endswith('data: [DONE]\n\n')
            outcomes.append('streamed')
        else:
            assert answer.json()['usage']['completion_tokens'] == body['max_tokens'] * body['n']
            outcomes.append('waited')

    async def main(url: str) -> None:
        jobs = iter(range(400))

        async def worker() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=30) as http:
                for i in jobs:
                    await one(http, i)

        await asyncio.gather(*(worker() for _ in range(24)))

    with live(server) as running:
        asyncio.run(asyncio.wait_for(main(running.url), 60))
        assert server.settled()
        metrics = server.context.metrics
        metrics.check()
        assert (metrics.finished, metrics.failed) == (360, 0) and outcomes.count('left') == 40
        assert not any(status >= 500 for status in metrics.responses)
        assert server.context.admission.running == server.context.admission.queued == 0

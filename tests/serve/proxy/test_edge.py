"""What of a request reaches a node, and which: models, headers, credentials, framing."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from lmdeploy.serve.auth import Access
from tests.serve.proxy.fakes import CHAT, NODE_KEY, FakeNode, proxy, run

PATH = '/v1/chat/completions'


def test_no_credential_of_a_client_reaches_a_node():
    """What a node gets is a short list, its own key, and who asks, without the key of who asks."""
    secret = 'the-client-s-own-secret'

    async def main():
        async with FakeNode().run() as node, proxy(api_keys=(secret,)) as running:
            await running.join(node, api_key='for-this-node')
            for headers in ({'authorization': f'Bearer {secret}'}, {'x-api-key': secret}):
                more = {'cookie': f'k={secret}', 'proxy-authorization': secret, 'x-forwarded-for': secret,
                        'connection': 'keep-alive, traceparent', 'traceparent': secret, 'te': 'trailers',
                        'x-lmdeploy-caller': 'somebody-else', 'x-evil': secret, 'upgrade': 'h2c'}
                found = await running.http.post(PATH, json=CHAT, headers=headers | more)
                assert found.status_code == 200, found.text
            for asked in node.asked:
                assert secret not in repr(asked) and NODE_KEY not in repr(asked)
                assert asked.header('authorization') == 'Bearer for-this-node'
                assert [value for name, value in asked.headers if name == 'x-lmdeploy-caller'] == [
                    running.context.keys.authenticate([(b'x-api-key', secret.encode())], Access.USER).id]
                assert {name for name, _ in asked.headers} <= {
                    'host', 'x-request-id', 'accept-encoding', 'x-lmdeploy-caller', 'authorization', 'accept',
                    'content-type', 'user-agent', 'content-length'}
            refused = await running.http.post(PATH, json=CHAT)
            assert refused.status_code == 401 and len(node.asked) == 2

    run(main())


@pytest.mark.parametrize('value', [b'a\x01b', b'a\x7fb', b'\xff\xfe', b'\x00', b' a ', b'a\x0bb', b'\t'])
def test_no_header_of_a_client_harms_a_node(value):
    async def main():
        async with FakeNode().run() as node, proxy() as running:
            await running.join(node)
            body = json.dumps(CHAT).encode()
            for name in (b'User-Agent', b'Accept', b'traceparent', b'X-Request-Id'):
                for _ in range(4):
                    reader, writer = await asyncio.open_connection('127.0.0.1', int(running.url.rsplit(':', 1)[1]))
                    writer.write(b'POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                                 b'%s: %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s' % (
                                     PATH.encode(), name, value, len(body), body))
                    found = await reader.read()
                    assert found.split(b' ')[1] in (b'200', b'400')
                    writer.close()
            assert (await running.status())[node.url]['failures'] == 0

    run(main())


@pytest.mark.parametrize('body', [b'[]', b'nonsense', b'{"model": 3}', b'{"model": "a", "x": NaN}', b'',
                                  b'{"model": "%s"}' % (b'x' * 600)])
def test_bodies_that_are_refused_reach_no_node(body):
    async def main():
        async with FakeNode().run() as node, proxy() as running:
            await running.join(node)
            found = await running.http.post(PATH, content=body, headers={'content-type': 'application/json'})
            assert found.status_code == 400 and node.asked == []

    run(main())


def test_requests_go_to_nodes_of_their_model():
    async def main():
        a, b = FakeNode('a', models=('one', 'both')), FakeNode('b', models=('two', 'both'))
        async with a.run(), b.run(), proxy() as running:
            found = await running.http.post(PATH, json={'model': 'one'})
            assert (found.status_code, found.headers['retry-after']) == (503, '5')
            await running.join(a, b)
            async with openai.AsyncOpenAI(api_key='x', base_url=f'{running.url}/v1', max_retries=0) as client:
                assert [model.id async for model in client.models.list()] == ['both', 'one', 'two']
            for model, nodes in (('one', {'a'}), ('two', {'b'}), ('both', {'a', 'b'})):
                answers = [(await running.http.post('/v1/completions', json={'model': model})).json()['node']
                           for _ in range(20)]
                assert set(answers) == nodes
            found = await running.http.post(PATH, json={'model': 'three'})
            assert (found.status_code, found.json()['error']['code']) == (404, 'model_not_found')
            found = await running.http.post('/tokenize', json={'text': 'x'})
            assert found.status_code == 400 and 'both, one, two' in found.json()['error']['message']
            running.context.nodes.get(a.url).down('test')
            found = await running.http.post(PATH, json={'model': 'one'})
            assert (found.status_code, found.json()['error']['code']) == (503, 'no_node')
            assert (await running.http.get('/v1/models')).json()['data'][0]['id'] == 'both'
            assert (await running.http.get('/v1/models/both')).json()['id'] == 'both'
            assert (await running.http.get('/v1/models/none')).status_code == 404

    run(main())


def test_smuggled_requests_reach_a_node_once_at_most():
    """Whatever the framing of a request, a node sees no second one in it."""
    inner = b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}'
    body = json.dumps(CHAT).encode()
    framings = [f'{a}\r\n{b}' for a in ('Content-Length: %d', 'Content-Length : %d', 'Content-Length: +%d')
                for b in ('Transfer-Encoding: chunked', 'Transfer-Encoding : chunked', 'Transfer-Encoding: xchunked',
                          'transfer-encoding:\tchunked', 'Transfer-Encoding: chunked, identity', 'X: y')]

    async def main():
        async with FakeNode().run() as node, proxy() as running:
            await running.join(node)
            for framing in framings:
                before = len(node.asked)
                reader, writer = await asyncio.open_connection('127.0.0.1', int(running.url.rsplit(':', 1)[1]))
                head = framing % len(body) if '%d' in framing else framing
                writer.write(f'POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{head}'
                             '\r\n\r\n'.encode() + body + b'\r\n0\r\n\r\n' + inner)
                writer.write_eof()
                try:
                    await asyncio.wait_for(reader.read(), 1)
                except (asyncio.TimeoutError, ConnectionError):
                    pass
                writer.close()
                assert len(node.asked) - before <= 1
                assert all(asked.path == PATH for asked in node.asked)

    run(main())

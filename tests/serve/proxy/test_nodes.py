"""Nodes come, go, fail and come back, over HTTP; who may say so; and a proxy that starts again."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import time
from collections import Counter

import pytest

from lmdeploy.serve.fetch import Address
from lmdeploy.serve.proxy import membership
from lmdeploy.serve.proxy.membership import Membership
from lmdeploy.serve.proxy.state import StateFile
from tests.serve.proxy.fakes import (
    CHAT,
    MODEL,
    NODE_AUTH,
    NODE_KEY,
    FakeNode,
    answer_ok,
    die,
    proxy,
    run,
    whole,
)

PATH = '/v1/chat/completions'
NODE_ROUTES = [('GET', '/nodes/status'), ('POST', '/nodes/add'), ('POST', '/nodes/remove'),
               ('POST', '/nodes/terminate'), ('GET', '/nodes/terminate_all'), ('POST', '/nodes/terminate_all')]


async def soon(true, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def test_the_routes_about_nodes_need_the_node_key():
    async def main():
        async with FakeNode().run() as node, proxy(api_keys=('user',)) as running:
            for method, path in NODE_ROUTES:
                for headers in ({}, {'authorization': 'Bearer user'}, {'x-api-key': NODE_KEY[:-1]},
                                {'authorization': f'Basic {NODE_KEY}'}, {'authorization': b'Bearer \xff\xfe'}):
                    found = await running.http.request(method, path, headers=headers, json={'url': node.url})
                    assert found.status_code == 401, (method, path, headers)
                    assert found.json()['error']['code'] == 'invalid_node_key'
            assert len(running.context.nodes) == 0
            assert (await running.http.get('/nodes/status', headers={'x-api-key': NODE_KEY})).json() == {}
            for path in ('/health', '/ready'):
                assert (await running.http.get(path)).status_code in (200, 503)
            for path in ('/v1/models', '/metrics', '/docs', '/openapi.json', '/nodes', '/nodes/'):
                assert (await running.http.get(path)).status_code == 401

    run(main())


def test_a_life_of_a_node():
    async def main():
        async with FakeNode(models=('one', 'two')).run() as node, proxy() as running:
            assert (await running.http.get('/ready')).status_code == 503
            added = await running.http.post('/nodes/add', json={'url': node.url + '/'}, headers=NODE_AUTH)
            assert added.json() == {'message': 'Added successfully', 'heartbeat_seconds': 0.5}
            assert (await running.http.get('/ready')).status_code == 200
            assert await running.status() == {node.url: {
                'models': ['one', 'two'], 'role': 'Hybrid', 'speed': None, 'unfinished': 0, 'latency': [], 'up': True,
                'served': 0, 'failures': 0, 'reason': ''}}
            assert (await running.http.post(PATH, json={'model': 'two'})).status_code == 200
            assert len((await running.status())[node.url]['latency']) == 1
            body = {'url': node.url, 'status': {'models': ['three'], 'speed': 2.5, 'role': 'Hybrid', 'unfinished': 9,
                                                'latency': [1.0]}}
            assert (await running.http.post('/nodes/add', json=body, headers=NODE_AUTH)).status_code == 200
            status = (await running.status())[node.url]
            assert (status['models'], status['speed'], status['unfinished'], status['served']) == (['three'], 2.5, 0, 1)
            counts = (await running.http.get('/metrics')).text
            assert f'lmdeploy:proxy_node_served_total{{node="{node.url}"}} 1.0' in counts
            removed = await running.http.post('/nodes/remove', json={'url': node.url}, headers=NODE_AUTH)
            assert removed.status_code == 200 and await running.status() == {}
            again = await running.http.post('/nodes/remove', json={'url': node.url}, headers=NODE_AUTH)
            assert (again.status_code, again.json()['error']['code']) == (404, 'node_not_found')

    run(main())


BODIES = [{}, {'url': 3}, {'url': 'http://8.8.8.8:80'}, {'url': 'http://169.254.169.254/'},
          {'url': 'http://metadata.invalid'}, {'url': 'http://u:p@127.0.0.1:1'}, {'url': 'http://127.0.0.1:1/x'},
          {'url': 'file:///etc/passwd'}, {'status': {'models': []}}, {'status': {'models': ['']}},
          {'status': {'models': [1]}}, {'status': {'models': ['m'], 'speed': 0}},
          {'status': {'models': ['m'], 'speed': -1}}, {'status': {'models': ['m'], 'role': 'Prefill'}},
          {'status': {'models': ['m'] * 65}}, {'status': {'models': ['m']}, 'api_key': 'a\r\nb: c'},
          {'status': {'models': ['m']}, 'api_key': ''}]


@pytest.mark.parametrize('body', BODIES, ids=range(len(BODIES)))
def test_registrations_that_are_refused(body):
    """And with none of them anything is asked."""
    async def main():
        async with FakeNode(models=()).run() as node, proxy() as running:
            full = body if 'url' in body or not body else {'url': node.url, **body}
            found = await running.http.post('/nodes/add', json=full, headers=NODE_AUTH)
            assert found.status_code in (400, 502), found.text
            assert len(running.context.nodes) == 0 and node.asked == []

    run(main())


def test_a_node_that_says_nothing_sensible_of_its_models():
    async def main():
        async with FakeNode().run() as node, proxy() as running:
            for models in ((), tuple(f'x{i}' for i in range(65)), ('a' * 600,)):
                node.models = models
                found = await running.http.post('/nodes/add', json={'url': node.url}, headers=NODE_AUTH)
                assert (found.status_code, found.json()['error']['code']) == (502, 'node_failed')
        async with proxy() as running:
            found = await running.http.post('/nodes/add', json={'url': node.url}, headers=NODE_AUTH)
            assert found.status_code == 502  # nobody listens there any more

    run(main())


def test_heartbeats():
    """A node that hangs holds up no other; one that is away is out, and in again when it answers."""
    async def main():
        hanging, well = FakeNode('hanging', health=b''), FakeNode('well')
        async with hanging.run(), well.run(), proxy(heartbeat_seconds=0.2) as running:
            async with FakeNode('away').run() as away:
                await running.join(hanging, well, away)
                await asyncio.sleep(0.5)
                assert all(node['up'] for node in (await running.status()).values())
            node = running.context.nodes.get(away.url)
            await soon(lambda: not node.up)
            assert running.context.nodes.get(well.url).up and 'ConnectError' in node.reason
            answers = Counter([(await running.http.post(PATH, json=CHAT)).json()['node'] for _ in range(20)])
            assert set(answers) == {'hanging', 'well'}
            async with away.run():
                await soon(lambda: node.up)
                sick = running.context.nodes.get(well.url)
                well.health = whole(b'{}', '503 Sick')
                await soon(lambda: not sick.up)
                assert '503' in sick.reason
                well.health = whole(b'{}')
                await soon(lambda: sick.up)

    run(main())


def test_a_node_that_does_not_answer_its_heartbeats_is_out(monkeypatch):
    monkeypatch.setattr('lmdeploy.serve.proxy.links.PROBE_SECONDS', 0.1)

    async def main():
        async with FakeNode(health=b'').run() as node, proxy(heartbeat_seconds=0.1) as running:
            await running.join(node)
            await soon(lambda: not running.context.nodes.get(node.url).up)
            assert 'no answer within' in running.context.nodes.get(node.url).reason

    run(main())


def test_who_waits_for_a_node_that_is_lost_goes_to_another():
    """A machine without power sends nothing at all: its requests that nobody has seen a byte of need not time out."""
    async def silent(node, asked, writer):
        await asyncio.sleep(30)

    async def main():
        async with FakeNode('lost', silent).run() as lost, FakeNode('other').run() as other, proxy() as running:
            await running.join(lost)
            task = asyncio.ensure_future(running.http.post(PATH, json=CHAT))
            await soon(lambda: len(lost.asked) == 1)
            await running.join(other)
            running.context.nodes.get(lost.url).down('its machine is gone')
            found = await task
            assert found.status_code == 502 and lost.gone == 1  # when it was sent, there was no other
            lost_node = running.context.nodes.get(lost.url)
            lost_node.answered()
            running.context.nodes.get(other.url).unfinished += 1  # so that the lost one is first
            task = asyncio.ensure_future(running.http.post(PATH, json=CHAT))
            await soon(lambda: len(lost.asked) == 2)
            running.context.nodes.get(other.url).unfinished -= 1
            lost_node.down('its machine is gone')
            assert (await task).json() == {'node': 'other'}
            await running.settled()

    run(main())


def test_a_removed_node_finishes_what_it_began():
    async def slow(node, asked, writer):
        await asyncio.sleep(0.3)
        await answer_ok(node, asked, writer)

    async def main():
        async with FakeNode(answer=slow).run() as node, proxy() as running:
            await running.join(node)
            task = asyncio.ensure_future(running.http.post(PATH, json=CHAT | {'stream': True}))
            await soon(lambda: len(node.asked) == 1)
            await running.http.post('/nodes/remove', json={'url': node.url}, headers=NODE_AUTH)
            assert (await task).text.endswith('data: [DONE]\n\n')
            await running.settled()

    run(main())


def test_terminate():
    async def answer(node, asked, writer):
        status = '403 Forbidden' if node.name == 'stubborn' else '200 OK'
        writer.write(whole(b'{}', status))

    async def main():
        a, b, stubborn = FakeNode('a', answer), FakeNode('b', answer), FakeNode('stubborn', answer)
        async with a.run(), b.run(), stubborn.run(), proxy() as running:
            await running.join(a, b, stubborn, api_key='the-proxy')
            one = await running.http.post('/nodes/terminate', json={'url': a.url}, headers=NODE_AUTH)
            assert one.status_code == 200 and a.url not in await running.status()
            everyone = await running.http.get('/nodes/terminate_all', headers=NODE_AUTH)
            assert everyone.status_code == 502 and list(await running.status()) == [stubborn.url]
            for node in (a, b, stubborn):
                assert [(asked.method, asked.path, asked.header('authorization')) for asked in node.asked] == [
                    ('POST', '/terminate', 'Bearer the-proxy')]
            unknown = await running.http.post('/nodes/terminate', json={'url': a.url}, headers=NODE_AUTH)
            assert unknown.status_code == 404

    run(main())


def test_a_proxy_that_starts_again_knows_its_nodes(tmp_path):
    """But those that may no longer be, and those with a key of their own, which register again."""
    async def main():
        from lmdeploy.serve.proxy.addresses import AllowedNodes

        path = tmp_path / 'nodes.json'
        async with FakeNode().run() as node, FakeNode('keyed').run() as keyed:
            async with proxy(state=StateFile(path)) as running:
                await running.join(node)
                await running.join(keyed, api_key='secret')
            assert 'secret' not in path.read_text()
            async with proxy(state=StateFile(path)) as running:
                assert list(await running.status()) == [node.url]
                assert (await running.http.post(PATH, json=CHAT)).status_code == 200
            async with proxy(state=StateFile(path), allowed=AllowedNodes(['10.0.0.0/8'])) as running:
                assert await running.status() == {}

    run(main())


def test_prefixes_stay_on_their_node_and_callers_apart():
    def body(system: str, question: str) -> dict:
        return {'model': MODEL, 'messages': [{'role': 'system', 'content': system * 1100},
                                             {'role': 'user', 'content': question}]}

    async def main():
        nodes = [FakeNode(name) for name in 'abcd']
        async with nodes[0].run(), nodes[1].run(), nodes[2].run(), nodes[3].run(), proxy(
                api_keys=('k1', 'k2', 'k3', 'k4'), strategy='prefix_affinity') as running:
            await running.join(*nodes)
            homes = {}
            for key in ('k1', 'k2', 'k3', 'k4'):
                for system in 'vwxyz':
                    found = {(await running.http.post(PATH, json=body(system, f'question {i}'),
                                                      headers={'x-api-key': key})).json()['node'] for i in range(3)}
                    assert len(found) == 1
                    homes[key, system] = found.pop()
            assert len(set(homes.values())) > 1
            assert any(homes['k1', system] != homes[key, system] for key in ('k2', 'k3', 'k4') for system in 'vwxyz')
            next(node for node in nodes if node.name == homes['k1', 'v']).answer = die
            moved = (await running.http.post(PATH, json=body('v', 'x'), headers={'x-api-key': 'k1'})).json()['node']
            assert moved != homes['k1', 'v']

    run(main())


def test_a_server_stays_registered(monkeypatch, caplog):
    """Through a wrong key, a proxy that is not there, and one that has forgotten it; and it says good-bye."""
    monkeypatch.setattr(membership, 'HEARTBEAT_SECONDS', 0.2)
    monkeypatch.setattr(membership, 'FIRST_RETRY', 0.05)

    async def main():
        async with FakeNode().run() as node, proxy() as running:
            address, joined = Address.parse(running.url), []
            wrong = Membership(address, 'wrong', node.url, [MODEL])
            task = asyncio.ensure_future(wrong.run())
            await soon(lambda: 'LMD-569' in caplog.text and '401' in caplog.text)
            task.cancel()
            member = Membership(address, NODE_KEY, node.url, [MODEL], joined=lambda: joined.append(1))
            task = asyncio.ensure_future(member.run())
            await soon(lambda: node.url in [known.url for known in running.context.nodes])
            assert (await running.http.post(PATH, json=CHAT)).json() == {'node': 'a'}
            assert node.asked[0].header('authorization') == f'Bearer {member.api_key}'
            running.context.nodes.remove(node.url)
            await soon(lambda: len(running.context.nodes) == 1)
            assert joined == [1]
            await member.leave()
            await member.leave()
            assert await running.status() == {}
            await asyncio.sleep(0.3)
            assert await running.status() == {} and task.done()
            await wrong.close()
            await member.close()
        gone = Membership(address, NODE_KEY, node.url, [MODEL])
        task = asyncio.ensure_future(gone.run())
        await soon(lambda: 'ConnectError' in caplog.text)
        task.cancel()
        await gone.leave()
        await gone.close()

    run(main())


def test_per_key_limits_hold_at_the_proxy():
    from lmdeploy.serve.limits import Limits

    async def slow(node, asked, writer):
        await asyncio.sleep(0.4)
        await answer_ok(node, asked, writer)

    async def main():
        limits = Limits(key_requests=2)
        async with FakeNode(answer=slow).run() as node, proxy(api_keys=('a', 'b'), limits=limits) as running:
            await running.join(node)
            found = await asyncio.gather(*(running.http.post(PATH, json=CHAT, headers={'x-api-key': key})
                                           for key in 'aaaab'))
            assert Counter(answer.status_code for answer in found) == {200: 3, 429: 2}
            assert all(answer.headers['retry-after'] for answer in found if answer.status_code == 429)
            await running.settled()

    run(main())


def test_the_host_header_of_a_loopback_proxy():
    async def main():
        async with proxy() as running:
            found = await running.http.get('/health', headers={'host': 'evil.example'})
            assert found.status_code == 403

    run(main())


def test_nodes_with_tls(tmp_path):
    """The certificate must be trusted and be that of the name, though the connection goes to the checked address."""
    key, certificate = tmp_path / 'key.pem', tmp_path / 'certificate.pem'
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=localhost',
                    '-addext', 'subjectAltName=DNS:localhost', '-keyout', key, '-out', certificate], check=True,
                   capture_output=True)
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(certificate, key)
    trust = ssl.create_default_context(cafile=certificate)

    async def main():
        async with FakeNode(tls=served, host='localhost').run() as node:
            async with proxy(tls=trust) as running:
                await running.join(node)
                assert (await running.http.post(PATH, json=CHAT)).json() == {'node': 'a'}
                assert node.asked[0].header('host') == f'localhost:{node.port}'
                node.host = '127.0.0.1'  # which the certificate does not name
                await running.http.post('/nodes/remove', json={'url': f'https://localhost:{node.port}'},
                                        headers=NODE_AUTH)
                await running.join(node)
                assert (await running.http.post(PATH, json=CHAT)).status_code == 502
            async with proxy() as running:
                node.host = 'localhost'
                await running.join(node)
                assert (await running.http.post(PATH, json=CHAT)).status_code == 502
            assert len(node.asked) == 1

    run(main())

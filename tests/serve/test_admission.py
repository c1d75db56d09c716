"""Admission: places, the queue, allowances of keys, deadlines that clients ask for."""

from __future__ import annotations

import asyncio

import pytest

from lmdeploy.serve.admission import Admission
from lmdeploy.serve.auth import Caller, KeyRing
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.limits import Limits
from tests.serve.fake_server import CHAT
from tests.serve.test_edge import shape
from tests.serve.test_streams import LONG, URL, Connection, freed, run

ME = Caller('me')


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_places_go_round_in_order_and_come_back():
    gate = Admission(Limits(), most=4)
    order = []

    async def one(name, answers):
        async with gate.enter(ME, answers):
            order.append(name)
            assert gate.running <= 4
            await asyncio.sleep(0.001)

    async def main():
        await asyncio.gather(*(one(i, 1 + i % 4) for i in range(20)))

    asyncio.run(main())
    assert order == list(range(20))
    assert gate.running == gate.queued == gate.waiting == 0


def test_one_larger_than_all_places_runs_alone():
    gate = Admission(Limits(), most=2)

    async def main():
        async with gate.enter(ME, 5):
            assert gate.running == 5

    asyncio.run(main())
    assert gate.running == 0


def test_cancelled_waiters_lose_no_place():
    gate = Admission(Limits(), most=1)

    async def hold(seconds):
        async with gate.enter(ME, 1):
            await asyncio.sleep(seconds)

    async def main():
        for seconds in (0, 0.001, 0.01):
            tasks = [asyncio.ensure_future(hold(0.002)) for _ in range(6)]
            await asyncio.sleep(seconds)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert gate.running == gate.queued == 0

    asyncio.run(main())


def test_a_full_queue_turns_away_with_the_seconds_to_wait(serve):
    server = serve(step_seconds=0.005, max_concurrent_requests=1, limits=Limits(queue=2))

    async def main():
        waiting = [Connection(server, LONG) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert server.context.admission.queued == 2
        turned = Connection(server, CHAT)
        await asyncio.wait_for(turned.task, 1)
        assert turned.sent[0]['status'] == 503
        [wait] = [value for name, value in turned.sent[0]['headers'] if name == b'retry-after']
        assert 1 <= int(wait) <= 30
        for connection in waiting:
            connection.left.set()
        await asyncio.gather(*(connection.task for connection in waiting))
        await freed(server)

    run(main())
    assert server.context.metrics.rejected['server_busy'] == 1
    assert server.context.metrics.accepted == 1


def test_requests_of_a_key_at_a_time(serve):
    server = serve(step_seconds=0.005, keys=KeyRing(['a', 'b']), limits=Limits(key_requests=2))

    async def main():
        async with server.http() as http:
            async def ask(key):
                return await http.post(URL, json=CHAT | {'max_tokens': 50}, headers={'x-api-key': key})

            answers = await asyncio.gather(*(ask('a') for _ in range(4)), ask('b'))
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200, 200, 200, 429, 429]
        assert answers[-1].status_code == 200
        shape(next(a for a in answers if a.status_code == 429), 429, 'rate_limit_exceeded')

    run(main())


def test_requests_and_tokens_per_minute():
    clock = Time()
    gate = Admission(Limits(key_requests_per_minute=3, key_tokens_per_minute=100), clock=clock)

    async def one(caller=ME):
        async with gate.enter(caller, 1):
            pass

    async def main():
        for _ in range(3):
            await one()
        with pytest.raises(HttpError, match='requests per minute') as caught:
            await one()
        assert caught.value.params['retry_after'] == pytest.approx(20)
        await one(Caller('other'))
        clock.now += 21
        await one()
        gate.spend(ME, 250)
        clock.now += 60
        with pytest.raises(HttpError, match='tokens per minute') as caught:
            await one()
        assert caught.value.params['retry_after'] == pytest.approx(31, abs=1)
        clock.now += 120
        await one()

    asyncio.run(main())


@pytest.mark.parametrize(('value', 'status'), [('0.2', 504), ('1e6', 200), ('x', 400), ('-1', 400), ('nan', 400),
                                               ('inf', 400)])
def test_a_client_may_ask_for_a_shorter_deadline(serve, value, status):
    server = serve(step_seconds=0.01)
    response = server.post(URL, CHAT | {'max_tokens': 60, 'ignore_eos': True}, headers={'x-request-timeout': value})
    assert response.status_code == status
    assert server.settled()

"""ThreadClient: streams over threads and event loops, aborts, crashes, closing."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.fake import FakeExecutor, continuation
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import ConfigError, EngineDead, RequestError
from lmdeploy.executor.base import Capacity

CAPACITY = Capacity(num_blocks=400, block_size=8, max_batch_size=16, max_step_tokens=64, session_len=2000,
                    vocab_size=100)


class SlowExecutor(FakeExecutor):
    """Takes a millisecond per step, so that requests are caught in the act."""

    def launch(self, plan):
        time.sleep(0.001)
        return super().launch(plan)


def make(executor_type=FakeExecutor, *, depth=2, **options):
    executor = executor_type(CAPACITY, **options)
    return ThreadClient(lambda: EngineCore(executor, CAPACITY, depth=depth))


async def collect(client, request):
    tokens, finish = [], None
    async for delta in client.submit(request):
        assert finish is None, 'a delta after the last'
        tokens += delta.tokens
        finish = delta.finish
    return tokens, finish


def wait_idle(client, seconds=5.0):
    end = time.monotonic() + seconds
    while client.stats().in_flight or client.stats().used_blocks:
        assert time.monotonic() < end, client.stats()
        time.sleep(0.002)
    stats = client.stats()
    assert stats.accepted == stats.finished + stats.failed + stats.cancelled + stats.in_flight


@pytest.mark.parametrize('depth', [1, 2])
def test_concurrent_streams_equal_a_plain_loop(depth):
    client = make(depth=depth)
    params = SamplingParams(max_new_tokens=40, stop_ids=(5,))

    async def main():
        prompts = [[i, i + 1, 7] * (i + 1) for i in range(30)]
        answers = await asyncio.gather(
            *(collect(client, EngineInput(str(i), prompt, params)) for i, prompt in enumerate(prompts)))
        for prompt, (tokens, finish) in zip(prompts, answers):
            assert (tokens, finish.reason) == continuation(prompt, params, 100, 2000)

    asyncio.run(main())
    wait_idle(client)
    client.close()


def test_many_threads_with_loops_of_their_own():
    client = make()
    params = SamplingParams(max_new_tokens=10)
    failures = []

    def worker(k):
        async def main():
            for i in range(10):
                tokens, _ = await collect(client, EngineInput(f'{k}/{i}', [k, i, 3], params))
                if tokens != continuation([k, i, 3], params, 100, 2000)[0]:
                    failures.append((k, i))

        asyncio.run(main())

    threads = [threading.Thread(target=worker, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failures
    wait_idle(client)
    client.close()


def test_closing_the_generator_aborts():
    client = make(SlowExecutor)

    async def main():
        stream = client.submit(EngineInput('a', [1, 2], SamplingParams(max_new_tokens=1900)))
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(main())
    wait_idle(client)
    assert client.stats().cancelled == 1
    client.close()


def test_abort_gives_a_last_delta():
    client = make(SlowExecutor)

    async def main():
        stream = client.submit(EngineInput('a', [1, 2], SamplingParams(max_new_tokens=1900)))
        reasons = []
        async for delta in stream:
            client.abort('a')
            if delta.finish:
                reasons.append(delta.finish.reason)
        assert reasons == ['abort']

    asyncio.run(main())
    wait_idle(client)
    client.abort('unknown')
    client.close()


def test_a_cancelled_task_aborts_its_request():
    client = make(SlowExecutor)

    async def main():
        params = SamplingParams(max_new_tokens=1900)
        tasks = [asyncio.ensure_future(collect(client, EngineInput(str(i), [1, i], params))) for i in range(20)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    wait_idle(client)
    assert client.stats().cancelled == 20
    client.close()


def test_a_loop_that_was_stopped_without_closing_its_streams():
    client = make(SlowExecutor)
    loop = asyncio.new_event_loop()

    async def start():
        stream = client.submit(EngineInput('a', [1, 2], SamplingParams(max_new_tokens=1900)))
        await stream.__anext__()
        return stream

    stream = loop.run_until_complete(start())
    loop.close()
    wait_idle(client)
    del stream
    client.close()


def test_same_id_twice_is_refused():
    client = make(SlowExecutor)

    async def main():
        first = client.submit(EngineInput('a', [1, 2], SamplingParams(max_new_tokens=1900)))
        await first.__anext__()
        with pytest.raises(RequestError, match='LMD-333'):
            await collect(client, EngineInput('a', [1, 2], SamplingParams()))
        await first.aclose()

    asyncio.run(main())
    client.close()


def test_refusals_come_as_deltas():
    client = make()

    async def main():
        for tokens, code in (([], 'LMD-330'), ([1] * 2000, 'LMD-330'), ([100], 'LMD-331'), ([-1], 'LMD-331')):
            got, finish = await collect(client, EngineInput('a', tokens, SamplingParams()))
            assert got == [] and finish.reason == 'error' and finish.error.code == code

    asyncio.run(main())
    assert client.stats().rejected == 4 and client.stats().accepted == 0
    client.close()


@pytest.mark.parametrize('depth', [1, 2])
def test_a_crash_reaches_every_pending_request_and_all_later_ones(depth):
    client = make(depth=depth, fail_at=7)

    async def main():
        requests = [EngineInput(str(i), [1, i], SamplingParams(max_new_tokens=100)) for i in range(30)]
        for _, finish in await asyncio.gather(*(collect(client, request) for request in requests)):
            assert finish.reason == 'error' and isinstance(finish.error, EngineDead)
            assert 'device error in step 7' in str(finish.error)
        _, finish = await collect(client, EngineInput('late', [1], SamplingParams()))
        assert isinstance(finish.error, EngineDead)

    asyncio.run(asyncio.wait_for(main(), 10))
    wait_idle(client)
    client.close()


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_fault_of_the_bookkeeping_itself_hangs_nobody(monkeypatch):
    client = make(SlowExecutor)

    async def main():
        params = SamplingParams(max_new_tokens=1900)
        requests = [asyncio.ensure_future(collect(client, EngineInput(str(i), [1], params))) for i in range(5)]
        await asyncio.sleep(0.02)
        monkeypatch.setattr(client._core, 'step', lambda: 1 // 0)
        for _, finish in await asyncio.gather(*requests):
            assert isinstance(finish.error, EngineDead) and 'ZeroDivisionError' in str(finish.error)
        with pytest.raises(EngineDead):
            await collect(client, EngineInput('late', [1], SamplingParams()))

    asyncio.run(asyncio.wait_for(main(), 10))
    client.close()


def test_close_is_fast_idempotent_and_ends_streams():
    client = make(SlowExecutor)

    async def main():
        stream = client.submit(EngineInput('a', [1, 2], SamplingParams(max_new_tokens=1900)))
        await stream.__anext__()
        client.close()
        reasons = [delta.finish.reason async for delta in stream if delta.finish]
        assert reasons == ['abort']
        with pytest.raises(EngineDead, match='LMD-339'):
            await collect(client, EngineInput('b', [1], SamplingParams()))

    begin = time.monotonic()
    asyncio.run(main())
    client.close()
    assert time.monotonic() - begin < 1
    idle = make()
    begin = time.monotonic()
    idle.close()
    assert time.monotonic() - begin < 1


def test_one_thread_builds_and_steps():
    """Whoever runs parallel CPU work keeps a team of threads: a second thread would give the process a second team."""
    names = []

    class Watched(FakeExecutor):
        def launch(self, plan):
            names.append(threading.current_thread().name)
            return super().launch(plan)

    def build():
        names.append(threading.current_thread().name)
        return EngineCore(Watched(CAPACITY), CAPACITY)

    client = ThreadClient(build)
    asyncio.run(collect(client, EngineInput('a', [1, 2], SamplingParams(max_new_tokens=3))))
    client.close()
    assert len(names) > 1 and set(names) == {'lmdeploy-engine'}


def test_what_building_raises_reaches_the_caller():
    def build():
        raise ConfigError('LMD-206', device='cuda', torch='0')

    with pytest.raises(ConfigError, match='LMD-206'):
        ThreadClient(build)
    assert not [t for t in threading.enumerate() if t.name == 'lmdeploy-engine' and t.is_alive() and not t.daemon]


def test_an_interrupt_while_loading_ends_the_thread(monkeypatch):
    """The load runs to its end, and the engine that nobody waits for is closed at once."""
    closed, release = threading.Event(), threading.Event()

    class Closing(EngineCore):
        def close(self):
            closed.set()
            return super().close()

    def build():
        release.wait(10)
        return Closing(FakeExecutor(CAPACITY), CAPACITY)

    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr('lmdeploy.engine.client.Future.result', interrupted)
    with pytest.raises(KeyboardInterrupt):
        ThreadClient(build)
    release.set()
    assert closed.wait(10)

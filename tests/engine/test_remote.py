"""ProcessClient against a process that behaves as the engine's, and misbehaves on demand."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace

import pytest

from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine import wire
from lmdeploy.engine.channel import Channel
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.fake import FakeExecutor, continuation
from lmdeploy.engine.remote import ProcessClient
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.engine.serving import serve
from lmdeploy.engine.supervisor import Child, Limits
from lmdeploy.errors import EngineDead, LoadError, RequestError
from tests.engine.fake_engine import CAPACITY, EXIT, HANG, KILL, RAISE

FAST = Limits(hang=0.6, patience=1.0, first_delay=0.05, last_delay=0.2, close=3.0, crashes=100)
LONG = SamplingParams(max_new_tokens=3000)
SHORT = SamplingParams(max_new_tokens=20)
SECONDS = 60.0  # for a whole story, on a busy machine


def program(*options):
    return (sys.executable, '-m', 'tests.engine.fake_engine', *options)


def story(tell):
    """A test that is a coroutine."""
    @functools.wraps(tell)
    def run(*args, **options):
        asyncio.run(asyncio.wait_for(tell(*args, **options), SECONDS))

    assert inspect.signature(run) == inspect.signature(tell)
    return run


@asynccontextmanager
async def started(*options, limits=FAST, restart=True, wait=True):
    client = ProcessClient(EngineConfig(session_len=77), '/a/model', program=program(*options), limits=limits,
                           restart=restart)
    try:
        if wait:
            await client.ready()
        yield client
    finally:
        await client.aclose()


async def collect(client, request):
    tokens, finish = [], None
    async with aclosing(client.submit(request)) as stream:
        async for delta in stream:
            assert finish is None, 'a delta after the last'
            tokens += delta.tokens
            finish = delta.finish
    return tokens, finish


async def first(client, request):
    """A stream of ``request`` that has begun."""
    stream = client.submit(request)
    await stream.__anext__()
    return stream


async def rest(stream):
    return [delta async for delta in stream][-1].finish


@contextmanager
def listening(caplog):
    """The package's logger does not propagate."""
    logger = logging.getLogger('lmdeploy')
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


async def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it does not come about'
        await asyncio.sleep(0.005)


def balanced(stats):
    return stats.accepted == stats.finished + stats.failed + stats.cancelled + stats.in_flight


def gone(pid):
    """Whether the process has ended (a zombie has)."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] == 'Z'
    except FileNotFoundError:
        return True


@story
async def test_two_hundred_streams_equal_a_plain_loop():
    async with started() as client:
        assert client.capacity == replace(CAPACITY, choices={'session_len': '77'}) and client.context_len == 4000
        params = [SamplingParams(max_new_tokens=5 + i % 30, stop_ids=(5,)) for i in range(200)]
        prompts = [[i % 80, 3, 7] * (1 + i % 9) for i in range(200)]
        answers = await asyncio.gather(
            *(collect(client, EngineInput(str(i), prompts[i], params[i])) for i in range(200)))
        for prompt, asked, (tokens, finish) in zip(prompts, params, answers):
            assert (tokens, finish.reason) == continuation(prompt, asked, 100, 4000)
        stats = client.stats()
        assert stats.accepted == stats.finished == 200 and not stats.used_blocks and balanced(stats)
        assert client.health().last_step_age == 0


@story
async def test_aborts_free_the_blocks():
    async with started('delay=0.002') as client:
        closed = await first(client, EngineInput('a', [1, 2], LONG))
        aborted = await first(client, EngineInput('b', [1, 2], LONG))
        task = asyncio.ensure_future(collect(client, EngineInput('c', [1, 2], LONG)))
        await until(lambda: client.stats().running == 3)
        await closed.aclose()
        client.abort('b')
        client.abort('unknown')
        task.cancel()
        assert (await rest(aborted)).reason == 'abort'
        await until(lambda: not client.stats().used_blocks, 1.0)
        assert client.stats().cancelled == 3 and balanced(client.stats())


@story
async def test_refusals_come_as_deltas_and_cost_nothing():
    async with started() as client:
        for tokens, code in (([], 'LMD-330'), ([1] * 4000, 'LMD-330'), ([100], 'LMD-331'), ([-1], 'LMD-331')):
            got, finish = await collect(client, EngineInput('a', tokens, SHORT))
            assert got == [] and finish.error.code == code
        with pytest.raises(RequestError, match='LMD-348'):
            await collect(client, EngineInput('a', [1.5], SHORT))
        assert client.stats().rejected == 4
        stream = await first(client, EngineInput('a', [1, 2], LONG))
        with pytest.raises(RequestError, match='LMD-333'):
            await collect(client, EngineInput('a', [1, 2], SHORT))
        await stream.aclose()


@story
async def test_a_slow_reader_gets_many_tokens_at_once():
    async with started() as client:
        stream = await first(client, EngineInput('a', [1, 2], SamplingParams(max_new_tokens=500)))
        await until(lambda: client.stats().finished == 1)
        deltas = [delta async for delta in stream]
        assert len(deltas) <= 2 and sum(len(delta.tokens) for delta in deltas) >= 400
        assert deltas[-1].finish.reason == 'length'


@pytest.mark.parametrize('prompt, cause', [
    (None, 'SIGKILL'), ([KILL], 'SIGKILL'), ([RAISE], 'RuntimeError: a device error'),
    ([EXIT], 'exit status 3; its last lines: .*the last words')])
@story
async def test_a_crash_fails_the_pending_requests_and_the_next_one_is_served(prompt, cause):
    async with started('delay=0.001') as client:
        streams = [await first(client, EngineInput(str(i), [1, i], LONG)) for i in range(8)]
        pid, begin = client.pid, time.monotonic()
        if prompt is None:
            os.kill(pid, signal.SIGKILL)
        else:
            streams.append(client.submit(EngineInput('bad', prompt, SHORT)))
        ends = await asyncio.gather(*(rest(stream) for stream in streams))
        assert time.monotonic() - begin < 1.5
        for finish in ends:
            assert finish.reason == 'error' and finish.error.code == 'LMD-343'
            assert re.search(cause, str(finish.error))
        health = client.health()
        assert health.state == 'restarting' and health.reason in str(finish.error) and health.retry_after > 0
        with pytest.raises(EngineDead, match='LMD-344'):
            await collect(client, EngineInput('now', [1], SHORT))
        assert await client.ready() == client.capacity
        assert gone(pid) and client.pid != pid and client.health().restarts == 1
        tokens, _ = await collect(client, EngineInput('now', [1, 2], SHORT))
        assert tokens == continuation([1, 2], SHORT, 100, 4000)[0]
        stats = client.stats()
        assert stats.failed == len(streams) and stats.finished == 1 and not stats.in_flight and balanced(stats)


@story
async def test_three_crashes_in_a_row_are_the_end():
    async with started(limits=replace(FAST, crashes=3)) as client:
        for i in range(3):
            await client.ready()
            _, finish = await collect(client, EngineInput('a', [KILL, i], SHORT))
            assert finish.error.code == 'LMD-343'
        with pytest.raises(EngineDead, match='LMD-345'):
            await client.ready()
        with pytest.raises(EngineDead, match='LMD-345.*SIGKILL'):
            await collect(client, EngineInput('b', [1], SHORT))
        health = client.health()
        assert health.state == 'failed' and 'SIGKILL' in health.reason and health.restarts == 2
        assert health.retry_after == 0


@story
async def test_without_restart_one_crash_is_the_end():
    async with started(restart=False) as client:
        await collect(client, EngineInput('a', [KILL], SHORT))
        with pytest.raises(EngineDead, match='SIGKILL'):
            await client.ready()
        assert client.health().state == 'failed' and client.health().restarts == 0


@story
async def test_a_request_that_crashes_the_engine_twice_is_refused_and_no_other():
    async with started('delay=0.001') as client:
        async def ask(i, tokens):
            await client.ready()
            return await collect(client, EngineInput(i, tokens, SamplingParams(max_new_tokens=1000)))

        async def insist(i, tokens):  # a client that tries again
            for attempt in range(6):
                try:
                    _, finish = await ask(f'{i}.{attempt}', tokens)
                except EngineDead:
                    continue
                if finish.error is None:
                    return finish.reason
            raise AssertionError('never served')

        innocent = [asyncio.ensure_future(insist(i, [1, i])) for i in range(4)]
        await until(lambda: client.stats().running == 4)
        for i in range(2):
            _, finish = await ask(f'bad{i}', [KILL, 1])
            assert finish.error.code == 'LMD-343'
        await client.ready()
        with pytest.raises(RequestError, match='LMD-346'):
            await ask('bad', [KILL, 1])
        assert await asyncio.gather(*innocent) == ['length'] * 4
        assert client.health().restarts == 2


@story
async def test_a_hanging_engine_shows_its_stacks_and_is_replaced(caplog):
    async with started() as client:
        with listening(caplog):
            begin = time.monotonic()
            _, finish = await collect(client, EngineInput('a', [HANG], SHORT))
            assert 'no step has ended for' in str(finish.error)
            assert FAST.hang <= time.monotonic() - begin < FAST.hang + 3
            await until(lambda: any('fake_engine.py' in record.message for record in caplog.records))
        await client.ready()
        assert (await collect(client, EngineInput('b', [1], SHORT)))[1].reason == 'length'


@story
async def test_neither_idleness_nor_a_loop_that_stands_still_is_a_hang():
    async with started('delay=0.001') as client:
        stream = await first(client, EngineInput('a', [1], SamplingParams(max_new_tokens=900)))
        time.sleep(3 * FAST.hang)  # noqa: ASYNC251 - this is the point
        assert (await rest(stream)).reason == 'length'
        await asyncio.sleep(2 * FAST.hang)
        assert client.health().restarts == 0 and client.health().state == 'ready'


@pytest.mark.parametrize('how, kind, code, text', [
    ('error', LoadError, 'LMD-120', '/a/model'), ('bug', EngineDead, 'LMD-338', 'KeyError'),
    ('crash', EngineDead, 'LMD-349', 'SIGKILL; its last lines: .*out of everything')])
@story
async def test_an_engine_that_cannot_load(how, kind, code, text):
    async with started(f'load={how}', wait=False) as client:
        for _ in range(2):
            with pytest.raises(kind, match=text) as caught:
                await client.ready()
            assert caught.value.code == code
        assert client.health().state == 'failed' and client.health().restarts == 0
        with pytest.raises(kind):
            await collect(client, EngineInput('a', [1], SHORT))


@story
async def test_a_program_that_is_not_there():
    client = ProcessClient(EngineConfig(), '/a', program=('/no/such/program',), limits=FAST)
    with pytest.raises(EngineDead, match='could not be started'):
        await client.ready()
    await client.aclose()


@story
async def test_requests_before_the_engine_is_ready():
    async with started('load=0.5', wait=False) as client:
        with pytest.raises(EngineDead, match='LMD-342'):
            await collect(client, EngineInput('a', [1], SHORT))
        await until(lambda: client.health().reason == 'thinking')
        assert client.health().state == 'loading'
        await client.ready()
        await collect(client, EngineInput('a', [1], SHORT))


@story
async def test_loading_has_a_time_limit():
    async with started('load=600', wait=False, limits=replace(FAST, load=0.3)) as client:
        with pytest.raises(EngineDead, match='not loaded within 0.3 s'):
            await client.ready()


@story
async def test_sleeping_frees_the_process_and_waking_starts_one():
    async with started('delay=0.001') as client:
        stream, pid = await first(client, EngineInput('a', [1], LONG)), client.pid
        await client.sleep()
        assert gone(pid) and (await rest(stream)).reason == 'abort'
        assert client.health().state == 'sleeping'
        with pytest.raises(EngineDead, match='LMD-347'):
            await collect(client, EngineInput('b', [1], SHORT))
        await client.wakeup()
        await client.wakeup()
        assert (await collect(client, EngineInput('b', [1], SHORT)))[1].reason == 'length'
        assert client.stats().cancelled == 1 and client.stats().finished == 1 and balanced(client.stats())


@story
async def test_what_the_engine_says_is_logged(caplog):
    with listening(caplog):
        async with started():
            pass
    said = {record.message: record.levelno for record in caplog.records}
    assert said['engine: loaded /a/model'] == logging.WARNING


# -- closing -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('state', ['untouched', 'loading', 'ready', 'streaming', 'restarting', 'failed', 'sleeping'])
@pytest.mark.parametrize('way', ['close', 'aclose', 'thread'])
@story
async def test_close_in_every_state(state, way):
    client = ProcessClient(EngineConfig(), '/a', program=program(*{
        'loading': ['load=600'], 'untouched': ['load=600'], 'failed': ['load=error'], 'streaming': ['delay=0.001'],
    }.get(state, [])), limits=replace(FAST, first_delay=30.0, last_delay=30.0))
    stream = None
    if state == 'loading':
        with pytest.raises(EngineDead):
            await collect(client, EngineInput('a', [1], SHORT))
    elif state == 'failed':
        with pytest.raises(LoadError):
            await client.ready()
    elif state != 'untouched':
        await client.ready()
        if state == 'streaming':
            stream = await first(client, EngineInput('a', [1], LONG))
        if state == 'restarting':
            await collect(client, EngineInput('a', [KILL], SHORT))
        if state == 'sleeping':
            await client.sleep()
    assert client.health().state == {'untouched': 'loading', 'streaming': 'ready'}.get(state, state)
    pid, begin = client.pid, time.monotonic()
    for _ in range(2):
        if way == 'close':
            client.close()
        elif way == 'aclose':
            await client.aclose()
        else:
            await asyncio.to_thread(client.close)
    assert time.monotonic() - begin < 3 and gone(pid) and client.health().state == 'closed'
    if stream is not None:
        assert (await rest(stream)).reason == 'abort'
    with pytest.raises(EngineDead, match='LMD-339'):
        await collect(client, EngineInput('b', [1], SHORT))
    with pytest.raises(EngineDead, match='LMD-339'):
        await client.ready()


@story
async def test_an_engine_that_does_not_end_is_killed():
    async with started(limits=replace(FAST, hang=60.0, close=0.3)) as client:
        stream = client.submit(EngineInput('a', [HANG], SHORT))
        task = asyncio.ensure_future(rest(stream))
        await until(lambda: client.health().last_step_age > 0.2)
        pid = client.pid
        await client.aclose()
        assert gone(pid) and (await task).reason == 'abort'


def test_nothing_is_left_behind():
    def held():
        threads = sum(thread.name.startswith('lmdeploy') for thread in threading.enumerate())
        return len(os.listdir('/proc/self/fd')), threads

    async def once():
        async with started() as client:
            await collect(client, EngineInput('a', [KILL], SHORT))
            await client.ready()
            await collect(client, EngineInput('b', [1], SHORT))
            await client.sleep()
            await client.wakeup()

    asyncio.run(once())
    before = held()
    for _ in range(2):
        asyncio.run(once())
    assert held() == before


def test_a_loop_that_ends_without_closing_ends_the_engine():
    async def forget():
        client = ProcessClient(EngineConfig(), '/a', program=program(), limits=FAST)
        await client.ready()
        await first(client, EngineInput('a', [1], LONG))
        return client

    client = asyncio.run(forget())
    end = time.monotonic() + 5
    while not gone(client.pid):
        assert time.monotonic() < end
        time.sleep(0.01)
    client.close()


def test_another_loop_is_refused():
    client = ProcessClient(EngineConfig(), '/a', program=program('load=600'), limits=FAST)

    async def health():
        with pytest.raises(EngineDead):
            await collect(client, EngineInput('a', [1], SHORT))

    loop = asyncio.new_event_loop()
    loop.run_until_complete(health())
    with pytest.raises(RuntimeError, match='event loop'):
        asyncio.run(health())
    client.close()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


# -- peers that do not speak as they should ------------------------------------------------------------------------

def babble(code):
    """A program that speaks for itself: ``s`` is its socket."""
    return (sys.executable, '-c', f'import socket, sys, time; s = socket.socket(fileno=int(sys.argv[1])); {code}')


@pytest.mark.parametrize('code', [
    's.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n"); time.sleep(60)',
    's.sendall(b"\\xff" * 1000); time.sleep(60)',
    's.sendall(b"\\x03\\0\\0\\0abc"); time.sleep(60)',
    's.sendall(b"\\0\\0\\0\\0" * 1000); time.sleep(60)',
])
@story
async def test_a_child_that_is_not_understood_is_ended(code):
    client = ProcessClient(EngineConfig(), '/a', program=babble(code), limits=FAST)
    with pytest.raises(EngineDead, match='LMD-349.*not understood'):
        await client.ready()
    assert gone(client.pid)
    await client.aclose()


@story
async def test_mutated_messages_of_the_engine_never_raise_in_the_server():
    """Every message that a real conversation has, damaged at random, through the client's own reader."""
    dice = random.Random(1)
    delta = wire.Delta('a', [1], 3, 0)
    stats = [0] * len(wire.STATS)
    good = [wire.Stage('x'), wire.Ready(CAPACITY, 10, stats), wire.Running(['a']), wire.Step([delta], stats, 0.1),
            wire.Ended('a', None), wire.Step([], stats, 0.0), wire.Step([delta, delta], [1], 0.0)]
    refused = 0
    client = ProcessClient(EngineConfig(), '/a', program=('/no/such/program',))
    for _ in range(400):
        ours, theirs = socket.socketpair()
        client._state = 'loading'
        channel = client._channel = Channel(ours, client._receive)
        data = bytearray()
        for message in dice.choices(good, k=3):
            frame = wire.encode(message)
            if dice.random() < 0.5:
                frame[dice.randrange(len(frame))] = dice.randrange(256)
            data += frame
        theirs.sendall(data)
        theirs.close()
        await asyncio.wait_for(channel.ended.wait(), 5)
        refused += channel.error is not None
        assert channel.error is None or isinstance(channel.error, wire.WireError)
        channel.close()
    assert refused > 100
    client.close()


def test_mutated_messages_of_the_server_end_the_engine_cleanly():
    dice = random.Random(2)
    good = [wire.submission(EngineInput(str(i), [1, 2, i], SHORT)) for i in range(3)] + [wire.encode(wire.Abort('1'))]
    refused = 0
    for _ in range(60):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            core = EngineCore(FakeExecutor(CAPACITY), CAPACITY)
            data = bytearray()
            for frame in dice.choices(good, k=4):
                frame = bytearray(frame)
                if dice.random() < 0.5:
                    frame[dice.randrange(len(frame))] = dice.randrange(256)
                data += frame
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            try:
                assert serve(core, ours)
            except wire.WireError:
                refused += 1
            core.check()
            assert not core.stats().used_blocks
    assert refused > 10


def test_an_engine_whose_server_sends_garbage_ends_by_itself():
    child = Child(program())
    child.sock.sendall(wire.encode(wire.Load(EngineConfig(), '/a', 30)))
    frames = wire.receive(child.sock, wire.Frames())
    while not isinstance(wire.to_server(next(frames)), wire.Ready):
        pass
    child.sock.sendall(b'\x05\0\0\0hello')
    assert child.wait(10) and 'exit status 76' in child.cause() and 'the parent sent' in child.cause()
    child.stop(1)

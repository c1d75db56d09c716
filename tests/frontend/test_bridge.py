"""The loop thread: calls, streams, interruption, closing, forks."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest

from lmdeploy.errors import RequestError
from lmdeploy.frontend.bridge import LoopThread


@pytest.fixture
def loop():
    thread = LoopThread()
    yield thread
    thread.close()


async def count(upto, closed, pause=0.0):
    try:
        for i in range(upto):
            await asyncio.sleep(pause)
            yield i
    finally:
        closed.append(True)


def test_run_returns_and_raises(loop):
    async def add(a, b):
        return a + b

    async def fail():
        raise KeyError('x')

    assert loop.run(add(1, 2)) == 3
    with pytest.raises(KeyError):
        loop.run(fail())


def test_iterate_gives_all_items_and_closes_the_stream(loop):
    closed: list[bool] = []
    assert list(loop.iterate(count(5, closed))) == list(range(5))
    assert closed == [True]


def test_closing_early_closes_the_stream(loop):
    closed: list[bool] = []
    stream = loop.iterate(count(1000, closed, pause=0.001))
    assert next(stream) == 0
    stream.close()
    assert closed == [True]


def test_an_error_in_the_stream_reaches_the_caller(loop):
    async def broken():
        yield 1
        raise ValueError('broken')

    stream = loop.iterate(broken())
    assert next(stream) == 1
    with pytest.raises(ValueError, match='broken'):
        next(stream)


def test_an_interrupted_caller_cancels_what_it_waited_for(loop):
    closed: list[bool] = []

    def interrupt():
        time.sleep(0.2)
        os.kill(os.getpid(), 2)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        for _ in loop.iterate(count(10**6, closed, pause=0.01)):
            pass
    assert closed == [True]
    assert list(loop.iterate(count(2, closed))) == [0, 1]  # still of use


def test_close_is_idempotent_and_ends_waiting_callers(loop):
    errors: list[BaseException] = []

    def wait():
        try:
            list(loop.iterate(count(10**6, [], pause=0.01)))
        except RequestError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    loop.close()
    loop.close()
    waiting.join(timeout=5)
    assert [error.code for error in errors] == ['LMD-315']
    with pytest.raises(RequestError, match='LMD-315'):
        loop.run(asyncio.sleep(0))


def test_closing_while_callers_keep_coming_leaves_nobody_waiting():
    for _ in range(20):
        loop, outcomes = LoopThread(), []

        def call(loop=loop, outcomes=outcomes):
            try:
                while True:
                    list(loop.iterate(count(1, [])))
                    loop.run(asyncio.sleep(0))
            except RequestError as error:
                outcomes.append(error.code)

        callers = [threading.Thread(target=call, daemon=True) for _ in range(4)]
        for caller in callers:
            caller.start()
        time.sleep(0.005)
        loop.close()
        for caller in callers:
            caller.join(timeout=5)
        assert outcomes == ['LMD-315'] * 4


def test_a_task_that_does_not_end_does_not_keep_close_from_ending(loop, monkeypatch):
    monkeypatch.setattr('lmdeploy.frontend.bridge.JOIN_SECONDS', 0.4)
    begun = threading.Event()

    async def stubborn():
        begun.set()
        for _ in range(20):
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                pass

    waiting = threading.Thread(target=lambda: loop.run(stubborn()), daemon=True)
    waiting.start()
    begun.wait(5)
    start = time.monotonic()
    loop.close()
    assert time.monotonic() - start < 1.5


def test_a_forked_child_is_told_so(loop):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            loop.run(asyncio.sleep(0))
        except RequestError as error:
            os.write(write, error.code.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 20) == b'LMD-316'
    os.close(read)
    os.close(write)

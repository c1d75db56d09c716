"""File descriptors that run out: no new connections, no busy loop, two lines in the log, and then on as before."""

from __future__ import annotations

import asyncio
import errno
import json
import resource
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lmdeploy.serve.lag import LoopLag
from lmdeploy.serve.listener import Listener, descriptors, is_starvation

SERVER = """
    import asyncio, json, logging, resource, socket, sys, time
    from lmdeploy.serve.lifecycle import _report, bind

    class Records(logging.Handler):
        lines = []
        def emit(self, record):
            self.lines.append((record.name, record.levelname))

    logging.getLogger().addHandler(Records())
    logging.getLogger('lmdeploy').addHandler(Records())
    logging.getLogger('lmdeploy').propagate = False
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))

    async def main():
        held = []
        async def take(reader, writer):
            held.append(writer)
        sock = bind('127.0.0.1', 0)
        asyncio.get_running_loop().set_exception_handler(_report)
        server = await asyncio.start_server(take, sock=sock, backlog=2048)
        print(sock.getsockname()[1], flush=True)
        while len(held) < 10:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        before, start = len(held), time.process_time()
        await asyncio.sleep(1.5)
        spent = time.process_time() - start
        while held:
            held.pop().close()
        await asyncio.sleep(1.5)
        print(json.dumps([before, spent, len(held), Records.lines]), flush=True)
        server.close()

    asyncio.run(main())
"""


def test_accepting_pauses_while_there_are_no_descriptors():
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, '-c', textwrap.dedent(SERVER)], stdout=subprocess.PIPE, text=True,
                          cwd=root) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        clients = [socket.create_connection(('127.0.0.1', port)) for _ in range(40)]
        before, spent, after, lines = json.loads(child.stdout.readline())
        for client in clients:
            client.close()
    assert child.returncode == 0
    assert 10 <= before < 32 and after == 40 - before  # some got in; when these had left, all others
    assert spent < 0.3
    assert lines == [['lmdeploy', 'ERROR'], ['lmdeploy', 'WARNING']]


def test_other_failures_are_reported_as_ever():
    starved = {'message': 'socket.accept() out of system resource', 'exception': OSError(errno.EMFILE, '')}
    assert is_starvation(starved)
    assert not is_starvation(starved | {'message': 'a task failed'})
    assert not is_starvation(starved | {'exception': OSError(errno.EBADF, '')})
    with Listener() as listener, pytest.raises(OSError) as caught:
        listener.accept()
    assert caught.value.errno == errno.EINVAL


def test_descriptors_are_asked_for_and_counted():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft - 10, 64), hard))
        assert descriptors(32) == 32
        assert descriptors(soft) == soft and resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft
        if hard != resource.RLIM_INFINITY:
            assert descriptors(hard + 1) == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_lag_is_measured_and_forgotten():
    lag = LoopLag()
    for now, value in ((0, .5), (1, .1), (31, .2), (32, .1)):
        lag.note(now, value)
    assert (lag.last, lag.worst) == (.1, .5)
    lag.note(62, .0)
    assert lag.worst == .2

    async def main():
        task = asyncio.create_task(measured.watch())
        await asyncio.sleep(0.15)
        time.sleep(0.2)  # what a handler must never do
        await asyncio.sleep(0.15)
        task.cancel()

    measured = LoopLag()
    asyncio.run(main())
    assert 0.1 < measured.worst < 1

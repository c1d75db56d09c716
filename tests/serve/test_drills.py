"""A server as a process, with a model: under load, short of everything, killed, and started where another one is."""

from __future__ import annotations

import ast
import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lmdeploy
from lmdeploy.serve.lifecycle import bind
from tests.toy import write_model

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = {'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': {'enum': ['yes', 'no']}}}
LISTENING = '0A'
DESCRIPTORS = 256


@pytest.fixture(scope='module')
def toy(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp('drills') / 'toy', max_position_embeddings=1024)


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'LMDEPLOY_LANG': 'en', **changes}


def test_two_hundred_requests_a_killed_client_a_killed_engine_and_a_drain(toy):
    command = [sys.executable, str(ROOT / 'benchmark' / 'server_load.py'), str(toy), '--requests', '200', '--clients',
               '32', '--streams', '40', '--tokens', '200']
    out = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert out.returncode == 0, out.stdout + out.stderr
    assert '0 lost, 0 of class 5xx' in out.stdout and '0 truncated' in out.stdout


def starve() -> None:
    """Neither files nor many descriptors."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))


def ask(port: int, path: str, body: dict | None = None) -> tuple[int, str]:
    """Status and body; 0 where nothing answers."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
    try:
        data = None if body is None else json.dumps(body)
        connection.request('GET' if body is None else 'POST', path, data, {'Content-Type': 'application/json'})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, http.client.HTTPException):
        return 0, ''
    finally:
        connection.close()


def until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    found = Path(f'/proc/{pid}/task').glob('*/children')
    return [int(child) for task in found for child in task.read_text().split()]


def listening(pid: int) -> list[int]:
    """The ports of all kinds on which a process waits for others."""
    inodes = set()
    for fd in Path(f'/proc/{pid}/fd').iterdir():
        try:
            inodes.add(os.readlink(fd))
        except OSError:
            continue
    ports = []
    for table in ('tcp', 'tcp6', 'udp', 'udp6'):
        for line in Path('/proc/net', table).read_text().splitlines()[1:]:
            fields = line.split()
            if f'socket:[{fields[9]}]' in inodes and (fields[3] == LISTENING or table.startswith('udp')):
                ports.append(int(fields[1].rsplit(':', 1)[1], 16))
    for line in Path('/proc/net/unix').read_text().splitlines()[1:]:
        fields = line.split()
        accepts, has_path = int(fields[3], 16) & 0x10000, len(fields) > 7
        if f'socket:[{fields[6]}]' in inodes and (accepts or has_path):
            ports.append(-1)
    return ports


def test_a_server_short_of_files_and_descriptors_serves_and_leaves_nothing(toy, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    nowhere = str(tmp_path / 'nowhere')
    server = subprocess.Popen(
        [sys.executable, '-B', '-m', 'lmdeploy', 'serve', 'api_server', str(toy), '--server-port', str(port),
         '--model-name', 'toy', '--audit-log', str(tmp_path / 'audit.jsonl')],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=starve, cwd='/',
        env=environment(HOME=nowhere, TMPDIR=nowhere, XDG_CACHE_HOME=nowhere, LMDEPLOY_CACHE=nowhere))
    try:
        until(lambda: server.poll() is not None or ask(port, '/ready')[0] == 200, 120)
        (engine,) = (pid for pid in children(server.pid)
                     if b'lmdeploy.engine' in Path(f'/proc/{pid}/cmdline').read_bytes())
        chat = {'model': 'toy', 'messages': [{'role': 'user', 'content': 'a'}], 'max_tokens': 8}
        assert ask(port, '/v1/chat/completions', chat)[0] == 200
        status, answer = ask(port, '/v1/chat/completions', chat | {'response_format': SCHEMA, 'max_tokens': 30})
        assert status == 200 and 'content' in answer
        # nothing that is inside can be reached from outside
        assert listening(server.pid) == [port] and listening(engine) == []
        # more clients than there are descriptors
        crowd = []
        for _ in range(2 * DESCRIPTORS):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(('127.0.0.1', port))
            crowd.append(sock)
        time.sleep(0.5)
        for sock in crowd:
            sock.close()
        until(lambda: ask(port, '/v1/chat/completions', chat)[0] == 200, 15)
        assert server.poll() is None

        def dropped() -> float:
            found = re.search(r'audit_dropped_total\{.*\} (\S+)', ask(port, '/metrics')[1])
            assert found is not None
            return float(found[1])

        until(lambda: dropped() >= 3, 15)  # the log is written beside the requests
        server.send_signal(signal.SIGKILL)
        server.wait()
        until(lambda: not Path(f'/proc/{engine}').exists() or 'Z' in Path(f'/proc/{engine}/stat').read_text(), 5)
        bind('127.0.0.1', port).close()
    finally:
        server.kill()
        server.wait()
    assert not Path(nowhere).exists() and [path.name for path in tmp_path.iterdir()] == ['audit.jsonl']


def test_a_busy_port_ends_a_start_before_the_model_is_loaded(toy):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        out = subprocess.run([sys.executable, '-m', 'lmdeploy', 'serve', 'api_server', str(toy), '--server-port',
                              str(taken.getsockname()[1])], capture_output=True, text=True, timeout=60,
                             env=environment())
    assert out.returncode == 98 and 'LMD-501' in out.stderr and str(os.getpid()) in out.stderr
    assert 'Loading' not in out.stderr + out.stdout and 'Traceback' not in out.stderr


def test_no_time_limit_is_of_the_clock_on_the_wall():
    """``time.time()`` and ``datetime.now()`` jump when somebody sets the clock: only what is shown may be theirs."""
    shown = {'serve/audit.py', 'serve/lifecycle.py', 'serve/openai/chat.py', 'serve/openai/completions.py',
             'serve/openai/responses_events.py'}
    found = set()
    package = Path(lmdeploy.__file__).parent
    for file in [*(package / 'serve').rglob('*.py'), *(package / 'engine').rglob('*.py')]:
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Attribute) and ast.unparse(node).removeprefix('datetime.') in {
                    'time.time', 'datetime.now', 'datetime.utcnow', 'now', 'utcnow'}:
                found.add(file.relative_to(package).as_posix())
    assert found == shown

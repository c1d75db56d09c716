"""Requests over HTTP against a live server: everything is counted, failures are too."""

from __future__ import annotations

import asyncio
import resource
import socket
import threading

import pytest

from lmdeploy.bench.online import Target
from lmdeploy.bench.online import serve as play
from lmdeploy.bench.stream import ask
from lmdeploy.bench.workload import Workload, fixed
from lmdeploy.errors import RequestError
from lmdeploy.serve.auth import KeyRing
from lmdeploy.serve.fetch import Address
from tests.serve.fake_server import MODEL, VOCAB
from tests.serve.live import live


def run(target: Target, load: Workload, **options):
    return asyncio.run(play(target, load, **{'rate': float('inf'), 'seed': 0, **options}))


def test_every_request_and_every_token_is_counted(serve):
    server = serve(step_seconds=0.002)
    with live(server) as running:
        report = run(Target(running.url, MODEL, VOCAB), fixed(6, 10, 12), rate=200.0, concurrency=3)
    assert (report.requests, report.succeeded, report.errors) == (6, 6, {})
    assert (report.prompt_tokens, report.output_tokens) == (60, 72)
    assert report.output_tokens_per_second == pytest.approx(72 / report.seconds)
    assert 2 <= report.per_token.p50 and report.first_token.p50 < report.end_to_end.p50
    assert report.end_to_end.p50 >= 12 * 2 and report.request_rate == 200.0


def test_more_connections_than_the_shell_allows(serve):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = serve(num_blocks=2000, step_seconds=0.001)
    with live(server) as running:
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
        try:
            report = run(Target(running.url, MODEL, VOCAB), fixed(90, 4, 2))  # each has two ends in this process
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (report.succeeded, report.errors) == (90, {})


def test_arrivals_are_waited_for(serve):
    server = serve()
    with live(server) as running:
        report = run(Target(running.url, MODEL, VOCAB), fixed(5, 4, 2), rate=20.0, seed=1)
    assert report.succeeded == 5 and report.seconds > 0.05


def test_failures_are_counted_by_reason(serve):
    server = serve()
    load = Workload('mixed', (4, 4, 4), (3, 100_000, 3))  # the second asks for more than a session holds
    with live(server) as running:
        report = run(Target(running.url, MODEL, VOCAB), load)
        assert report.succeeded + sum(report.errors.values()) == 3 and report.succeeded >= 2
        with pytest.raises(RequestError) as error:
            run(Target(running.url, 'no-such-model', VOCAB), fixed(2, 4, 2))
    assert error.value.code == 'LMD-592' and 'HTTP 404' in error.value.text('en')


def test_a_server_that_is_not_there():
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(RequestError) as error:
        run(Target(f'http://127.0.0.1:{port}', MODEL, VOCAB, timeout=5), fixed(1, 4, 2))
    assert error.value.code == 'LMD-592' and 'refused' in error.value.text('en').lower()


@pytest.mark.parametrize('answer, reason', [
    (b'', 'closed the connection'), (b'SSH-2.0-x\r\n\r\n', 'not HTTP'),
    (b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [{"text": "a"}]}\n\n', 'broke off'),
    (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"message": "engine died"}}\n\n', 'engine died'),
    (b'HTTP/1.1 200 OK\r\n\r\ndata: {nonsense\n\n', 'JSONDecodeError'),
    (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndat', 'IncompleteReadError'),
    (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n', 'ValueError'),
    (b'HTTP/1.1 503 Busy\r\n\r\n{"error": {"message": "later"}}', 'HTTP 503: later'),
    (b'HTTP/1.1 502 Bad Gateway\r\n\r\n<html>', 'HTTP 502: <html>')])  # fmt: skip
def test_broken_answers_are_failures_and_nothing_more(answer, reason):
    with socket.create_server(('127.0.0.1', 0)) as server:
        thread = threading.Thread(target=_answer, args=(server, answer))
        thread.start()
        url = f'http://127.0.0.1:{server.getsockname()[1]}'
        got = asyncio.run(ask(Address.parse(url), '/v1/completions', {'prompt': [1]}, None, 5))
        thread.join(5)
    assert reason in got.error


def test_a_silent_server_is_given_up():
    with socket.create_server(('127.0.0.1', 0)) as server:
        url = f'http://127.0.0.1:{server.getsockname()[1]}'
        got = asyncio.run(ask(Address.parse(url), '/v1/completions', {'prompt': [1]}, None, 0.2))
    assert got.error == 'no whole answer within 0.2 s' and got.ended - got.sent < 3


def test_the_key_is_sent(serve):
    server = serve(keys=KeyRing(['secret']))
    with live(server) as running:
        assert run(Target(running.url, MODEL, VOCAB, api_key='secret'), fixed(2, 4, 2)).succeeded == 2
        with pytest.raises(RequestError, match='401'):
            run(Target(running.url, MODEL, VOCAB), fixed(2, 4, 2))


def _answer(server: socket.socket, answer: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(answer)

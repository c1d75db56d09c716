"""Over real TCP: bytes that are no request, requests that readers would cut differently, and clients that are slow."""

from __future__ import annotations

import json
import socket
import time

import pytest

from lmdeploy.serve import connection
from lmdeploy.serve.auth import KeyRing
from lmdeploy.serve.limits import Limits
from tests.serve.fake_server import CHAT, MODEL, events
from tests.serve.live import live
from tests.serve.test_live import raw, start_stream

NEXT = b'GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n'
BODY = b'{"input":"a"}'
CHUNKED = b'd\r\n' + BODY + b'\r\n0\r\n\r\n'
CODED = b'Transfer-Encoding: chunked'


def post(fields: bytes, body: bytes = BODY, line: bytes = b'POST /v1/encode HTTP/1.1') -> bytes:
    return line + b'\r\nHost: localhost\r\nContent-Type: application/json\r\n' + fields + b'\r\n\r\n' + body


def get(fields: bytes = b'Host: localhost', target: bytes = b'/v1/models', version: bytes = b'HTTP/1.1') -> bytes:
    return b'GET ' + target + b' ' + version + b'\r\n' + fields + b'\r\n\r\n'


REFUSED = {  # one response, a 400, and nothing that follows on the connection is read as a request
    'a length and chunks': post(b'Content-Length: 13\r\n' + CODED, CHUNKED),
    'chunks and a length': post(CODED + b'\r\nContent-Length: 4', CHUNKED),
    'two codings in two fields': post(CODED + b'\r\nTransfer-Encoding: identity', CHUNKED),
    'chunked twice in two fields': post(CODED + b'\r\n' + CODED, CHUNKED),
    'chunked, then another': post(CODED + b', identity', CHUNKED),
    'another, then chunked': post(b'Transfer-Encoding: gzip, chunked', CHUNKED),
    'identity, then chunked': post(b'Transfer-Encoding: identity, chunked', CHUNKED),
    'chunked twice': post(CODED + b', chunked', CHUNKED),
    'an unknown coding': post(b'Transfer-Encoding: xchunked', CHUNKED),
    'a coding after a control character': post(b'Transfer-Encoding: \x0bchunked', CHUNKED),
    'a coding on a line of its own': post(b'Transfer-Encoding:\r\n chunked', CHUNKED),
    'a space before the colon': post(b'Transfer-Encoding : chunked', CHUNKED),
    'a coding for HTTP/1.0': post(CODED, CHUNKED, b'POST /v1/encode HTTP/1.0'),
    'two lengths': post(b'Content-Length: 13\r\nContent-Length: 0'),
    'two equal lengths': post(b'Content-Length: 13\r\nContent-Length: 13'),
    'a list of lengths': post(b'Content-Length: 13, 13'),
    'a signed length': post(b'Content-Length: +13'),
    'a negative length': post(b'Content-Length: -1'),
    'a length in hexadecimal': post(b'Content-Length: 0xd'),
    'a length of 77 bits': post(b'Content-Length: 99999999999999999999999'),
    'a length in two parts': post(b'Content-Length: 1 3'),
    'no length': post(b'Content-Length:'),
    'bare line feeds': post(b'Content-Length: 13').replace(b'\r\n', b'\n'),
    'a bare line feed': post(b'Content-Length: 13').replace(b'\r\n', b'\n', 1),
    'a bare carriage return': post(b'X: a\rContent-Length: 13'),
    'a zero byte in a value': post(b'X: a\0b\r\nContent-Length: 13'),
    'a zero byte in a name': post(b'X\0: b\r\nContent-Length: 13'),
    'no name': post(b': b\r\nContent-Length: 13'),
    'no colon': post(b'Content-Length 13'),
    'a space in a name': post(b'X y: b\r\nContent-Length: 13'),
    'a negative chunk': post(CODED, b'-' + CHUNKED),
    'a signed chunk': post(CODED, b'+' + CHUNKED),
    'a chunk in 0x': post(CODED, b'0x' + CHUNKED),
    'a chunk of 68 bits': post(CODED, b'f' * 17 + b'\r\n' + BODY + b'\r\n0\r\n\r\n'),
    'a chunk that wraps around': post(CODED, b'1' + b'0' * 15 + CHUNKED),
    'a line feed in an extension': post(CODED, b'd;a\nb\r\n' + CHUNKED[3:]),
    'a line feed after a size': post(CODED, b'd\n' + CHUNKED[3:]),
    'no line end after a chunk': post(CODED, b'd\r\n' + BODY + b'0\r\n\r\n'),
    'a chunk longer than its size': post(CODED, b'5' + CHUNKED[1:]),
    'a space after a size': post(CODED, b'd \r\n' + CHUNKED[3:]),
    'a length behind the chunks': post(CODED, CHUNKED[:-2] + b'Content-Length: 100\r\n\r\n'),
    'two hosts': get(b'Host: localhost\r\nHost: evil.com'),
    'two hosts, the second good': get(b'Host: evil.com\r\nHost: localhost'),
    'HTTP/2': b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n',
    'HTTP/1.2': get(version=b'HTTP/1.2'),
    'HTTP/9.9': get(version=b'HTTP/9.9'),
    'HTTP/1.1 in lower case': get(version=b'http/1.1'),
    'TLS': b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03',
    'CONNECT': b'CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n',
    'an unknown method': b'FOO /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n',
    'a long method': b'G' * 70_000 + b' / HTTP/1.1\r\n\r\n',
    'a target with a space': get(target=b'/v1/models x'),
    'a target with a zero byte': get(target=b'/v1/mod\0els'),
    'a target beyond ASCII': get(target=b'/v1/mod\xffels'),
}
ANSWERED = {  # one response of this status, and the next request on the connection is answered too
    'plain': (post(b'Content-Length: 13'), 200),
    'chunked': (post(CODED, CHUNKED), 200),
    'chunked in capitals': (post(b'TRANSFER-ENCODING: CHUNKED', CHUNKED), 200),
    'a chunk with an extension': (post(CODED, b'd;a=b' + CHUNKED[1:]), 200),
    'a field behind the chunks': (post(CODED, CHUNKED[:-2] + b'X: y\r\n\r\n'), 200),
    'a body where none is wanted': (get(b'Host: localhost\r\nContent-Length: 13\r\nContent-Type: application/json',)
                                    + BODY, 200),
    'no host': (get(b'Accept: */*'), 403),
    'another host': (get(b'Host: evil.com'), 403),
    'TRACE': (b'TRACE /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n', 404),
    'OPTIONS *': (b'OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n', 404),
    'a path of control characters': (get(target=b'/v1/%ff%00%0d%0aX:%20y'), 404),
    'a range': (get(b'Host: localhost\r\nRange: bytes=0-0,' + b'1-1,' * 500 + b'2-2'), 200),
    'an offer of a websocket': (get(b'Host: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n'
                                    b'Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=='), 200),
    'an offer of HTTP/2': (get(b'Host: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n'
                               b'HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA'), 200),
    'a body behind an offer': (post(b'Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 13'), 200),
    'chunks behind an offer': (post(b'Connection: Upgrade\r\nUpgrade: h2c\r\n' + CODED, CHUNKED), 200),
    'a request as a body behind an offer': (
        post(b'Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d' % len(NEXT), NEXT), 400),
}


def statuses(found: bytes) -> list[int]:
    """Of the responses in what a server sent."""
    return [int(part[:3]) for part in found.split(b'HTTP/1.1 ')[1:]]


@pytest.fixture
def running(serve):
    with live(serve(check_host=True)) as running:
        yield running


def test_what_two_readers_would_cut_differently_is_refused_and_nothing_behind_it_is_read(running):
    wrong = {}
    for name, data in REFUSED.items():
        found = raw(running, data + NEXT, 2.0)
        if statuses(found) != [400]:
            wrong[name] = found[:200]
    assert not wrong
    assert raw(running, NEXT).startswith(b'HTTP/1.1 200')


@pytest.mark.parametrize('pieces', [1, 7])
def test_what_is_a_request_is_one_however_it_arrives(running, pieces):
    wrong = {}
    for name, (data, status) in ANSWERED.items():
        data += NEXT
        with socket.create_connection(('127.0.0.1', running.port), timeout=3) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            size = -(-len(data) // pieces)
            for start in range(0, len(data), size):
                sock.sendall(data[start:start + size])
                time.sleep(0.002 * (pieces > 1))
            found = b''
            while piece := sock.recv(65536):
                found += piece
        if statuses(found) != [status, 200]:
            wrong[name] = found[:300]
    assert not wrong


def test_a_client_that_may_not_send_its_body_is_told_before_it_does(serve):
    with live(serve(keys=KeyRing(['token']))) as running:
        found = raw(running, post(b'Content-Length: 13\r\nExpect: 100-continue', b''), 1.0)
        assert statuses(found) == [401]
    with live(serve()) as running:
        found = raw(running, post(b'Content-Length: 13\r\nExpect: 100-continue'), 1.0)
        assert statuses(found) == [100, 200]


@pytest.mark.parametrize('fields', [
    b''.join(b'X%d: a\r\n' % i for i in range(5000)), b'X: ' + b'a' * 200_000 + b'\r\n',
    b'Cookie: ' + b'a=b; ' * 20_000 + b'\r\n'], ids=['many', 'long', 'cookies'])
def test_a_flood_of_header_fields_is_refused(running, fields):
    found = raw(running, get(b'Host: localhost\r\n' + fields[:-2]), 2.0)
    assert statuses(found) == [431] and len(found) < 4096


def test_a_long_target_is_refused(running):
    assert statuses(raw(running, get(target=b'/' + b'a' * 60_000), 2.0)) == [404]
    assert statuses(raw(running, get(target=b'/' + b'a' * 65_530), 2.0)) == [431]
    assert statuses(raw(running, get(target=b'/' + b'a' * 100_000), 2.0)) == [400]
    assert statuses(raw(running, get(target=b'/v1/models?' + b'a' * 1_200_000), 2.0)) == []  # not even read


def trickle(running, begin: bytes, piece: bytes, seconds: float) -> float:
    """Send ``piece`` again and again, a few times a second, until the server has closed; returns after how long."""
    start = time.monotonic()
    with socket.create_connection(('127.0.0.1', running.port), timeout=seconds) as sock:
        sock.sendall(begin)
        sock.settimeout(0.05)
        while time.monotonic() - start < seconds:
            try:
                sock.sendall(piece)
                if not sock.recv(65536):
                    break
            except TimeoutError:
                pass
            except OSError:
                break
    return time.monotonic() - start


def test_a_header_that_trickles_is_given_up(running, monkeypatch):
    monkeypatch.setattr(connection, 'HEADER_SECONDS', 0.5)
    assert 0.4 < trickle(running, b'GET /v1/models HTTP/1.1\r\nHost: localhost\r\n', b'X: y\r\n', 5.0) < 2.0


@pytest.mark.parametrize(('begin', 'piece'), [
    (post(b'Content-Length: 100000', b''), b'x'), (post(CODED, b''), b'1\r\nx\r\n'), (post(CODED, b'1;'), b'a')],
    ids=['bytes', 'chunks', 'an extension'])
def test_a_body_that_trickles_is_given_up(serve, begin, piece):
    with live(serve(limits=Limits(body_seconds=1))) as running:
        assert 0.9 < trickle(running, begin, piece, 6.0) < 3.0
        assert raw(running, NEXT).startswith(b'HTTP/1.1 200')


def test_slow_clients_take_nothing_from_others(serve):
    server = serve(limits=Limits(connections=200))
    with live(server) as running:
        slow = [socket.create_connection(('127.0.0.1', running.port)) for _ in range(150)]
        for i, sock in enumerate(slow):
            sock.sendall((b'GET / HT', post(b'Content-Length: 1000', b'{'), post(CODED, b'1\r\n'))[i % 3])
        begin = time.monotonic()
        for _ in range(20):
            assert raw(running, NEXT).startswith(b'HTTP/1.1 200')
        assert time.monotonic() - begin < 2.0
        for sock in slow:
            sock.close()
    assert server.settled()


def shrunk(running, data: bytes) -> socket.socket:
    """A client with the smallest window there is, that reads nothing of what it asked for."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(('127.0.0.1', running.port))
    sock.sendall(data)
    return sock


def test_an_answer_that_nobody_takes_is_dropped(serve, monkeypatch):
    monkeypatch.setattr(connection, 'UNREAD_SECONDS', 0.3)
    server = serve()
    body = b'{"model":"%s","input":[%s],"return_token_str":true}' % (MODEL.encode(), b','.join(
        [b'"%s"' % (b'a ' * 120)] * 250))
    with live(server) as running:
        running.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of the connections that it accepts
        asks = [post(b'Content-Length: %d\r\nConnection: %s' % (len(body), kind), body)
                for kind in (b'close', b'keep-alive')]
        assert len(raw(running, asks[0])) > 200_000
        clients = [shrunk(running, ask) for ask in asks for _ in range(10)]
        end = time.monotonic() + 10
        while server.context.metrics.responses[200] < 21:
            assert time.monotonic() < end
            time.sleep(0.02)
        while held(running.port):
            assert time.monotonic() < end, 'a connection is kept for a client that takes nothing'
            time.sleep(0.05)
        for sock in clients:
            sock.close()
        assert raw(running, NEXT).startswith(b'HTTP/1.1 200')


def held(port: int) -> int:
    """The connections that the server has not closed."""
    found = 0
    with open('/proc/net/tcp') as table:
        for line in list(table)[1:]:
            fields = line.split()
            listens, orphaned = fields[3] == '0A', fields[9] == '0'
            found += int(fields[1].rsplit(':', 1)[1], 16) == port and not listens and not orphaned
    return found


def test_fifty_readers_that_take_nothing_stall_nobody_and_hold_no_more_than_their_share(serve):
    limits = Limits(stream_bytes=4096, stall_seconds=1)
    server = serve(step_seconds=0.002, max_batch_size=64, num_blocks=1100, limits=limits)
    with live(server) as running:
        slow = [start_stream(running, max_tokens=200) for _ in range(50)]
        times = []
        with start_stream(running, max_tokens=100) as good:
            found = b''
            while not found.endswith(b'0\r\n\r\n'):
                found += good.recv(65536)
                times.append(time.monotonic())
        assert found.count(b'data: ') > 50 and b'data: [DONE]' in found
        gaps = sorted(b - a for a, b in zip(times, times[1:]))
        assert gaps[len(gaps) // 2] < 0.1
        for sock in slow:
            sock.close()
    assert server.settled()


def test_requests_that_wait_behind_a_stream_are_answered_after_it(serve):
    server = serve(step_seconds=0.002)
    with live(server) as running:
        with start_stream(running, max_tokens=30) as sock:
            sock.sendall(post(b'Content-Length: 13') * 3 + NEXT)
            found = b''
            while piece := sock.recv(65536):
                found += piece
    stream, _, rest = found.partition(b'0\r\n\r\n')
    assert b'data: [DONE]' in stream and statuses(rest) == [200] * 4


def test_a_client_that_leaves_in_the_middle_of_its_own_pipeline_leaves_nothing(serve):
    server = serve(step_seconds=0.005)
    with live(server) as running:
        for _ in range(5):
            with start_stream(running) as sock:
                sock.sendall(post(b'Content-Length: 13') * 50)
        end = time.monotonic() + 2
        while server.context.running:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert server.settled()


def chat(**change: object) -> bytes:
    body = json.dumps(CHAT | {'max_tokens': 200, 'ignore_eos': True} | change).encode()
    return post(b'Content-Length: %d' % len(body), body, b'POST /v1/chat/completions HTTP/1.1')


SCHEMA = {'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': {
    'type': 'object', 'properties': {f'p{i}': {'type': 'string', 'maxLength': 50} for i in range(100)}}}}
PHASES: dict[str, bytes | tuple[bytes, ...]] = {  # what was sent, one after the other, when the client leaves
    'half a header': chat()[:60],
    'half a body': chat()[:-20],
    'half of chunks': post(CODED, b'5\r\n{"mod\r\n', b'POST /v1/chat/completions HTTP/1.1'),
    'a request': chat(),
    'a request with another behind it': chat() + NEXT,
    'a request, and later another': (chat(), NEXT),
    'a request with half of one behind it': chat() + chat()[:-20],
    'a request for several answers': chat(n=4),
    'a stream': chat(stream=True),
    'a stream with another behind it': chat(stream=True) * 2,
    'a request whose grammar is compiled': chat(response_format=SCHEMA, ignore_eos=False),
}


@pytest.mark.parametrize('kill', [False, True], ids=['closed', 'killed'])
@pytest.mark.parametrize('wait', [0.0, 0.05], ids=['at once', 'later'])
def test_whoever_leaves_is_noticed_in_every_phase(serve, kill, wait):
    server = serve(step_seconds=0.02, max_batch_size=2, max_concurrent_requests=8)  # 200 steps would take 4 seconds
    with live(server) as running:
        for phase, data in PHASES.items():
            for _ in range(3):  # one of them waits
                sock = socket.create_connection(('127.0.0.1', running.port))
                for piece in (data,) if isinstance(data, bytes) else data:
                    sock.sendall(piece)
                    time.sleep(wait)
                if kill:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, connection.RESET)
                sock.close()
            end = time.monotonic() + 2.0
            while held(running.port) or server.context.running or server.client.stats().used_blocks:
                assert time.monotonic() < end, phase
                time.sleep(0.01)
        assert server.settled()
    server.context.metrics.check()
    assert server.context.metrics.finished == 0
    assert server.context.admission.running == server.context.admission.queued == 0


def test_a_stream_is_the_same_over_one_connection_and_many(serve):
    server = serve()
    with live(server) as running:
        found = []
        for _ in range(3):
            with start_stream(running, max_tokens=5) as sock:
                data = b''
                while not data.endswith(b'0\r\n\r\n'):
                    data += sock.recv(65536)
                _, _, body = data.partition(b'\r\n\r\n')
                text = b''.join(piece for i, piece in enumerate(body.split(b'\r\n')) if i % 2)
                found.append([event['choices'] for event in events(text.decode()) if event != '[DONE]'])
        assert found[0] == found[1] == found[2]

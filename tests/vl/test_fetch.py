"""The fetcher: no URL, name or redirect leads anywhere but to public addresses, and no server holds it up."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network

import pytest

from lmdeploy.vl import fetch
from lmdeploy.vl.fetch import Fetcher, FetchRules, Refused, Target, is_public

PRIVATE = ('127.0.0.1', '127.8.8.8', '0.0.0.0', '10.1.2.3', '172.16.0.1', '192.168.1.1', '169.254.169.254',
           '100.64.0.1',
           '100.100.100.200', '192.0.0.8', '192.0.2.1', '192.88.99.1', '198.18.0.1', '198.51.100.1', '203.0.113.1',
           '224.0.0.1', '239.255.255.255', '240.0.0.1', '255.255.255.255', '168.63.129.16', '::1', '::', 'fe80::1',
           'fc00::1', 'fd12::1', 'fec0::1', 'ff02::1', 'ff0e::1', '::ffff:127.0.0.1', '::ffff:10.0.0.1', '::7f00:1',
           '64:ff9b::7f00:1', '64:ff9b:1::7f00:1', '2002:7f00:1::', '2001:0:7f00:1::', '2001:db8::1', '3fff::1',
           '100::1', '5f00::1')  # fmt: skip
PUBLIC = ('8.8.8.8', '1.1.1.1', '93.184.216.34', '2606:4700::1111', '2a00:1450:4001::200e', '::ffff:8.8.8.8')
SPELLINGS = (
    # numbers that some resolver takes for 127.0.0.1
    '2130706433', '0x7f000001', '0x7f.1', '127.1', '127.0.1', '017700000001', '0177.0.0.1', '127.0.0.01', '0', '0x0',
    '127.0.0.1.', '1.2.3.4.5', '256.1.1.1', '127.0.0.0x1', '4294967296', '127.000.000.001',
    # who is who
    'user@127.0.0.1', 'user:pass@127.0.0.1', 'example.com@127.0.0.1', 'example.com:80@127.0.0.1',
    'example.com%40127.0.0.1',
    'example.com\\@127.0.0.1', 'example.com\\.evil', '127.0.0.1\\@example.com', 'example.com#@127.0.0.1:1',
    '127.0.0.1%2f@example.com', 'example.com&@127.0.0.1', 'example.com;127.0.0.1', 'a b.com', 'a\tb.com', 'a\nb.com',
    'a\rb.com', 'a\x00b.com', 'a\x7fb.com', '', '.', '..', '-a.com', 'a-.com', 'a..com', '.a.com', 'a_b.com', '*.a.com',
    'a' * 64 + '.com', ('a' * 60 + '.') * 5 + 'com',
    # other alphabets, zones, brackets
    'ⓔxample.com', '１２７.０.０.１', '127。0。0。1', 'bücher.example', 'xn--\u00fc.com', '[::1]', '[::1%25lo]',
    '[::1%lo]',
    '[fe80::1%eth0]', '[::ffff:127.0.0.1]', '[0:0:0:0:0:ffff:7f00:1]', '[::', '::1', '[::1', '[]', '[1]', '[v1.x]',
    '[::1].com', '[127.0.0.1]', '[0::1]', 'localhost.', 'localhost:', 'a.com:99999', 'a.com:0', 'a.com:-1',
    'a.com:80:80',
    'a.com:8080', 'a.com:22', 'a.com:6379', 'a.com:http', 'a.com:8０',
)  # fmt: skip
WHOLE = ('', 'x', '/etc/passwd', 'file:///etc/passwd', 'FILE:///etc/passwd', 'file://localhost/etc/passwd',
         'ftp://a.com/x',
         'gopher://a.com/x', 'data:,x', 'javascript:alert(1)', 'http:/a.com', 'http:a.com', 'http:///a.com',
         'http//a.com',
         '//a.com/x', 'https:\\\\a.com', 'http:\\\\127.0.0.1', 'http://', ' http://a.com', 'http://a.com ',
         'http://a.com/a b',
         'http://a.com/a\\b', 'http://a.com/\x01', 'http://a.com/é', 'http://a.com?x y', 'hTTp://127.0.0.1',
         'http://a.com/' + 'a' * 5000, 'ws://a.com', 'unix:///x', 'dict://a.com:11211/', 'jar:http://a.com!/x',
         'http://a.com\n', 'url:http://a.com', 'blob:http://a.com/x', 'about:blank')  # fmt: skip
NAMES = {'localhost': ['127.0.0.1'], 'a.com': ['127.0.0.1'], 'two.com': ['8.8.8.8', '127.0.0.1'], 'six.com': ['::1'],
         'both.com': ['8.8.8.8', '::1'], 'meta.com': ['169.254.169.254'], 'nat64.com': ['64:ff9b::7f00:1'],
         'zone.com': ['fe80::1%eth0'], 'none.com': [], 'odd.com': ['no address'], 'mapped.com': ['::ffff:127.0.0.1']}


def stub(host, port):
    if host not in NAMES:
        raise OSError('no such name')
    return NAMES[host]


def urls():
    yield from WHOLE
    for place in (*SPELLINGS, *(f'[{a}]' if ':' in a else a for a in PRIVATE), *NAMES, *map(str.upper, NAMES)):
        yield f'http://{place}/x.png'
    for host in ('localhost', '127.0.0.1', '[::1]', '169.254.169.254', 'metadata.google.internal'):
        yield from (f'https://{host}/', f'HTTP://{host.upper()}/', f'http://{host}:443/?a=b')


@pytest.fixture
def connections(monkeypatch):
    """Where connections go, none of which is made."""
    made = []

    def connect(address, timeout=None):
        made.append(address)
        raise ConnectionRefusedError('not in a test')

    monkeypatch.setattr(fetch.socket, 'create_connection', connect)
    return made


def test_no_url_of_the_table_makes_a_connection(connections):
    fetcher, table = Fetcher(resolve=stub), list(urls())
    assert len(set(table)) >= 120

    async def refused(url):
        with pytest.raises(Refused):
            await fetcher.fetch(url)

    async def run():
        for url in table:
            await refused(url)

    asyncio.run(run())
    fetcher.close()
    assert connections == []


def test_addresses_are_public_or_not():
    assert [text for text in PRIVATE if is_public(ip_address(text))] == []
    assert [text for text in PUBLIC if not is_public(ip_address(text))] == []


@pytest.mark.parametrize('url, read', [
    ('http://Example.COM', ('http', 'example.com', 80, '/')),
    ('https://a.b-c.com:443/x?y=z&a=%20#frag', ('https', 'a.b-c.com', 443, '/x?y=z&a=%20')),
    ('http://8.8.8.8/@x', ('http', '8.8.8.8', 80, '/@x')),
    ('http://[2606:4700::1111]:80/', ('http', '2606:4700::1111', 80, '/')),
    ('http://a.com?q', ('http', 'a.com', 80, '/?q')),
])
def test_plain_urls_are_read(url, read):
    assert Target.read(url) == Target(*read)


def test_a_name_is_resolved_once_and_its_address_is_what_is_connected_to(connections):
    answers = [['93.184.216.34'], ['127.0.0.1'], ['127.0.0.1']]
    asked = []

    def rebinding(host, port):
        asked.append(host)
        return answers.pop(0)

    fetcher = Fetcher(resolve=rebinding)
    with pytest.raises(Refused):
        asyncio.run(fetcher.fetch('http://rebind.com/x.png'))
    assert asked == ['rebind.com'] and connections == [('93.184.216.34', 80)]


def test_domains_narrow_what_is_public(connections):
    fetcher = Fetcher(FetchRules(domains=('a.com', '.b.com')), resolve=lambda host, port: ['8.8.8.8'])
    for url in ('http://x.com', 'http://aa.com', 'http://x.a.com', 'http://b.com', 'http://8.8.8.8'):
        with pytest.raises(Refused, match='allowed domains'):
            asyncio.run(fetcher.fetch(url))
    assert connections == []
    for url in ('http://a.com', 'http://x.b.com'):
        with pytest.raises(Refused):
            asyncio.run(fetcher.fetch(url))
    assert len(connections) == 2


# -- with a server ---------------------------------------------------------------------------------------------------

PICTURE = b'\x89PNG' + bytes(5000)


class Handler(BaseHTTPRequestHandler):
    """What servers do, by path."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        kind, _, rest = self.path[1:].partition('/')
        if kind == 'to':
            self.answer(302, b'', Location=rest)
        elif kind == 'hop':
            self.answer(302, b'', Location=f'/hop/{int(rest) - 1}' if int(rest) else '/ok')
        elif kind == 'gzip':
            self.answer(200, PICTURE, **{'Content-Encoding': 'gzip'})
        elif kind == 'long':
            self.answer(200, b'', **{'Content-Length': str(10 << 30)})
        elif kind == 'stream':
            self.stream()
        elif kind == 'cut':
            self.answer(200, PICTURE, **{'Content-Length': '9999'})
            self.close_connection = True
        elif kind == 'slow':
            self.send_response(200)
            self.end_headers()
            for _ in range(600):
                self.wfile.write(b'x')
                self.wfile.flush()
                time.sleep(0.1)
        elif kind == 'missing':
            self.answer(404, PICTURE)
        else:
            self.answer(200, PICTURE)

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def stream(self):
        self.send_response(200)
        self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()
        for _ in range(100_000):
            self.wfile.write(b'10000\r\n' + bytes(0x10000) + b'\r\n')
            self.server.sent += 0x10000

    def log_message(self, *args):
        pass


@contextmanager
def serving():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads, server.seen, server.sent = True, [], 0
    server.handle_error = lambda *args: None  # clients leave
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server, f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()


LOOPBACK = FetchRules(networks=(ip_network('127.0.0.1/32'),), max_bytes=1 << 20, seconds=5)


def test_a_loopback_server_is_reached_where_that_is_allowed():
    with serving() as (server, root):
        fetcher = Fetcher(LOOPBACK, resolve=lambda host, port: ['127.0.0.1'])
        assert asyncio.run(fetcher.fetch(f'{root}/ok')) == PICTURE
        assert asyncio.run(fetcher.fetch(f'http://named.com:{server.server_port}/ok?x=1')) == PICTURE
        assert asyncio.run(fetcher.fetch(f'{root}/hop/2')) == PICTURE
        path, headers = server.seen[1]
        assert path == '/ok?x=1' and headers['Host'] == f'named.com:{server.server_port}'
        assert headers['Accept-Encoding'] == 'identity' and 'Cookie' not in headers


@pytest.mark.parametrize('path', [
    'hop/4', 'to/http://127.0.0.2/', 'to/http://[::1]/', 'to/file:///etc/passwd', 'to/http://169.254.169.254/', 'to/',
    'to/http://localhost:1/', 'gzip/', 'long/', 'stream/', 'cut/', 'missing/'])
def test_what_a_server_must_not_do_ends_the_fetch(path):
    with serving() as (server, root):
        fetcher = Fetcher(LOOPBACK, resolve=lambda host, port: ['127.0.0.2'])
        with pytest.raises(Refused):
            asyncio.run(fetcher.fetch(f'{root}/{path}'))
        assert len(server.seen) <= 4 and server.sent <= 16 << 20


def test_a_server_that_drips_ends_with_the_deadline():
    with serving() as (_, root):
        fetcher = Fetcher(FetchRules(networks=LOOPBACK.networks, seconds=0.5))
        begin = time.monotonic()
        with pytest.raises(Refused, match='more than'):
            asyncio.run(fetcher.fetch(f'{root}/slow/'))
        assert time.monotonic() - begin < 2
        begin = time.monotonic()
        fetcher._pool.shutdown(wait=True)  # its thread is free again
        assert time.monotonic() - begin < 1

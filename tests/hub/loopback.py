"""A web server on this machine that can misbehave: the stand-in for package indexes and hubs."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


@dataclass
class Answer:
    """What the server sends. ``cut``: bytes after which the connection ends; ``pause``: seconds after half of it."""

    body: bytes = b''
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    pause: float = 0.0


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    range: str | None


class Loopback:
    """Serves ``site(request) -> Answer | None`` (None: 404) on 127.0.0.1; a context manager.

    ``seen`` lists (method, path) of every request.
    """

    def __init__(self, site: Callable[[Request], Answer | None]) -> None:
        self.seen: list[tuple[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                outer.seen.append((self.command, self.path))
                answer = site(Request(self.command, parts.path, query, self.headers.get('Range'))) or Answer(status=404)
                outer.send(self, answer)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        handler.send_response(answer.status)
        headers = {'Content-Length': str(len(answer.body)), **answer.headers}
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == 'HEAD':
            return
        body = answer.body if answer.cut is None else answer.body[:answer.cut]
        try:
            handler.wfile.write(body[:len(body) // 2])
            handler.wfile.flush()
            time.sleep(answer.pause)
            handler.wfile.write(body[len(body) // 2:])
        except OSError:  # the client has gone
            handler.close_connection = True
        if answer.cut is not None:
            handler.close_connection = True

    def count(self, ending: str, method: str = 'GET') -> int:
        """How many requests had a path with this ending."""
        return sum(verb == method and path.endswith(ending) for verb, path in self.seen)

    def __enter__(self) -> Loopback:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def ranged(body: bytes, request: Request) -> Answer:
    """``body``, or the part of it that the request's Range asks for."""
    if request.range is None:
        return Answer(body)
    first, _, last = request.range.removeprefix('bytes=').partition('-')
    start, stop = int(first), int(last or len(body) - 1) + 1
    if start >= len(body):
        return Answer(status=416)
    part = body[start:stop]
    return Answer(part, 206, {'Content-Range': f'bytes {start}-{start + len(part) - 1}/{len(body)}'})


class PackageIndex:
    """A simple package index (PEP 503). ``files``: file name -> content; ``faults``: file name -> Answer instead."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, Answer] = {}

    def add(self, name: str, version: str, members: dict[str, bytes]) -> bytes:
        """Offer a wheel with these members; returns its content."""
        wheel = make_wheel(name, version, members)
        self.files[f'{name.replace("-", "_")}-{version}-py3-none-any.whl'] = wheel
        return wheel

    def __call__(self, request: Request) -> Answer | None:
        if request.path.startswith('/files/'):
            name = request.path.removeprefix('/files/')
            if name in self.faults:
                return self.faults[name]
            return ranged(self.files[name], request) if name in self.files else None
        package = request.path.removeprefix('/simple/').strip('/').replace('-', '_')
        links = [f'<a href="/files/{name}#sha256={hashlib.sha256(content).hexdigest()}">{name}</a>'
                 for name, content in self.files.items() if name.partition('-')[0] == package]
        page = f'<!DOCTYPE html><html><body>{"".join(links)}</body></html>'
        return Answer(page.encode(), headers={'Content-Type': 'text/html'}) if links else None


def make_wheel(name: str, version: str, members: dict[str, bytes]) -> bytes:
    """A wheel that pip accepts."""
    info = f'{name.replace("-", "_")}-{version}.dist-info'
    about = {
        f'{info}/METADATA': f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n',
        f'{info}/WHEEL': 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
        f'{info}/RECORD': '',
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
        for member, content in {**members, **{path: text.encode() for path, text in about.items()}}.items():
            archive.writestr(member, content)
    return buffer.getvalue()


def as_json(value: object, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), status, {'Content-Type': 'application/json'})

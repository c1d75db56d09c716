"""One HTTP request from a client to a server of models, with the standard library alone.

Every request has a connection of its own: closing the response at any time is then all it takes to give up an answer,
and the server notices. Proxies of the environment are not used: the server is mostly on this machine, where they fail.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lmdeploy.errors import ConfigError, LmdeployError

CONNECT_SECONDS = 10.0
UNSPECIFIED = {'0.0.0.0': '127.0.0.1', '::': '::1'}  # where a server listens on all addresses, it does on loopback
MAX_DETAIL = 500
PIECE_BYTES = 1 << 16


class ServerConnectionError(LmdeployError, ConnectionError):
    """A server cannot be reached, or the connection broke before the answer was complete."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is.

    Attributes:
        prefix: of all paths, without a slash at its end; mostly empty.
    """

    scheme: str
    host: str
    port: int
    prefix: str = ''

    @classmethod
    def parse(cls, url: str) -> Address:
        """From ``http://HOST:PORT``; a scheme may be left out, 0.0.0.0 stands for this machine.

        Raises:
            ConfigError: LMD-581.
        """
        try:
            parts = urlsplit(url.strip() if '://' in url else f'http://{url.strip()}')
            port = parts.port or {'http': 80, 'https': 443}[parts.scheme]
        except (ValueError, KeyError):
            raise ConfigError('LMD-581', url=url) from None
        if not parts.hostname or parts.query or parts.fragment or parts.username is not None:
            raise ConfigError('LMD-581', url=url)
        return cls(parts.scheme, UNSPECIFIED.get(parts.hostname, parts.hostname), port, parts.path.rstrip('/'))

    @property
    def url(self) -> str:
        host = f'[{self.host}]' if ':' in self.host else self.host
        return f'{self.scheme}://{host}:{self.port}{self.prefix}'


class Response:
    """What a server answers. A context manager; leaving it closes the connection."""

    def __init__(self, address: Address, connection: http.client.HTTPConnection,
                 response: http.client.HTTPResponse) -> None:
        self._address, self._connection, self._response = address, connection, response
        self.status = response.status

    @property
    def streams(self) -> bool:
        """Whether the body comes line by line."""
        return self._response.headers.get_content_type() == 'text/event-stream'

    def read(self) -> bytes:
        """The whole body.

        Raises:
            ServerConnectionError: LMD-582.
        """
        try:
            return self._response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(error) from error

    def lines(self) -> Iterator[str]:
        """The lines of the body as they come, without their ends. A line is decoded when it is whole, so that it does
        not matter where the network cuts it.

        Raises:
            ServerConnectionError: LMD-582.
        """
        rest = b''
        while piece := self._piece():
            *lines, rest = (rest + piece).split(b'\n')
            for line in lines:
                yield line.decode('utf-8', 'replace').removesuffix('\r')
        if rest:
            yield rest.decode('utf-8', 'replace')

    def _piece(self) -> bytes:
        """What has come; empty at the end. (``readline`` takes a broken chunked body for a complete one.)"""
        try:
            piece = self._response.read1(PIECE_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(error) from error
        if not piece and self._response.length:
            raise self.lost(f'{self._response.length} bytes are missing')
        return piece

    def lost(self, reason: str) -> ServerConnectionError:
        """The error of an answer that ended too early."""
        return ServerConnectionError('LMD-582', url=self._address.url, reason=reason)

    def strange(self, reason: str) -> ServerConnectionError:
        """The error of an answer that is not a server's of models."""
        return ServerConnectionError('LMD-583', url=self._address.url, reason=reason)

    def _lost(self, error: Exception) -> ServerConnectionError:
        return self.lost(reason_of(error))

    def close(self) -> None:
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def fetch(address: Address, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, *,
          timeout: float | None = None, tls: ssl.SSLContext | None = None) -> Response:
    """Send a request and wait for the status of its answer.

    Args:
        body: a JSON value; None: there is none.
        timeout: seconds without a byte from the server after which it is given up; None: never.
        tls: how an ``https`` server is trusted; None: by the system's certificates.

    Raises:
        ServerConnectionError: LMD-580, it cannot be reached; LMD-582, it did not answer.
    """
    connection: http.client.HTTPConnection
    if address.scheme == 'https':
        connection = http.client.HTTPSConnection(address.host, address.port, timeout=CONNECT_SECONDS, context=tls)
    else:
        connection = http.client.HTTPConnection(address.host, address.port, timeout=CONNECT_SECONDS)
    try:
        try:
            connection.connect()
        except OSError as error:
            raise ServerConnectionError('LMD-580', url=address.url, reason=reason_of(error)) from error
        connection.sock.settimeout(timeout)
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode('utf-8', 'surrogatepass')
        fields = {'Connection': b'close', **{name: value.encode() for name, value in (headers or {}).items()}}
        try:
            connection.request(method, address.prefix + path, data, fields)
            return Response(address, connection, connection.getresponse())
        except (OSError, http.client.HTTPException) as error:
            raise ServerConnectionError('LMD-582', url=address.url, reason=reason_of(error)) from error
    except BaseException:
        connection.close()
        raise


def reason_of(error: Exception) -> str:
    """What an error of the network says; some say nothing but their names."""
    return f'{type(error).__name__}: {error}'[:MAX_DETAIL] if str(error) else type(error).__name__

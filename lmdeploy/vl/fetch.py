"""Fetcher: pictures from addresses that strangers name, without reaching anything that they should not reach.

A URL is read once, by one expression, and what was read is what is used: there is no second reader that could see
another host in it. Its name is resolved once; if any of its addresses is not public, nothing is connected to; otherwise
the connection goes to one of these very addresses. Each redirect goes through the same. The whole fetch has one
deadline, and what arrives is counted as it comes.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import urljoin

from lmdeploy.version import __version__

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolve = Callable[[str, int], Sequence[str]]

MAX_URL = 4096
PORTS = {'http': 80, 'https': 443}
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 3
FETCHES = 8  # at a time
CHUNK = 1 << 16
# authority without user, port of digits; path and query of printable characters, no backslash
URL = re.compile(r'(?i)(https?)://(\[[0-9a-f:.]{2,45}\]|[a-z0-9.-]{1,253})(?::([0-9]{1,5}))?((?:[/?][!"$-\[\]-~]*)?)')
LABEL = re.compile(r'(?i)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?')
# what ipaddress calls global and is not: translation and tunnels to other addresses, benchmarks, platforms' own
NOT_PUBLIC = tuple(map(ipaddress.ip_network, (
    '100.64.0.0/10', '168.63.129.16/32', '192.0.0.0/24', '192.88.99.0/24', '198.18.0.0/15', '224.0.0.0/4',
    '240.0.0.0/4', '2001::/23', '2001:db8::/32', '2002::/16', '3fff::/20')))
GLOBAL_6 = IPv6Network('2000::/3')


class Refused(Exception):
    """A fetch that was not made, or failed. The text is for the log: a client shall not learn what it reached."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that has been read: host in lower case without brackets, path with its query."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def read(cls, url: str) -> Target:
        """Read ``url``; its fragment is left out.

        Raises:
            Refused: it is none, or in a spelling that readers understand differently.
        """
        if len(url) > MAX_URL:
            raise Refused('the URL is too long')
        found = URL.fullmatch(url.partition('#')[0])
        if found is None:
            raise Refused('no plain http or https URL')
        scheme, host, port, path = found.groups()
        scheme, host = scheme.lower(), host.lower()
        if host.startswith('['):
            host = host[1:-1]
            if '.' in host or _ip(host) is None:
                raise Refused('no IPv6 address in its usual spelling')
        elif _numeric(host):
            if _ip(host) is None:
                raise Refused('no IPv4 address in its usual spelling')
        elif not all(LABEL.fullmatch(label) for label in host.split('.')):
            raise Refused('no name of a host')
        if port and not 0 < int(port) < 1 << 16:
            raise Refused('no port')
        path = path if path.startswith('/') else f'/{path}'
        return cls(scheme, host, int(port) if port else PORTS[scheme], path)

    @property
    def authority(self) -> str:
        """For the header Host."""
        host = f'[{self.host}]' if ':' in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f'{host}:{self.port}'

    @property
    def url(self) -> str:
        return f'{self.scheme}://{self.authority}{self.path}'


def _ip(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _numeric(host: str) -> bool:
    """Whether some resolver may read ``host`` as a number: its last label is one, in any base."""
    last = host.rpartition('.')[2]
    return last.isdigit() or re.fullmatch(r'0x[0-9a-f]*', last) is not None


def is_public(address: Address) -> bool:
    """Whether an address is of the public Internet, and no way to another one."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address not in GLOBAL_6:
            return False
    return address.is_global and not address.is_multicast and not any(
        address in network for network in NOT_PUBLIC if network.version == address.version)


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True, slots=True)
class FetchRules:
    """What may be fetched.

    Attributes:
        domains: names of hosts, or ``.suffix`` for all below one; empty: any.
        networks: addresses that are reached although they are not public, on any port.
        max_bytes, seconds: of one fetch, its redirects included.
    """

    domains: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()
    max_bytes: int = 20 << 20
    seconds: float = 10.0

    def admits(self, host: str) -> bool:
        """Whether a host's name is among the domains."""
        return not self.domains or any(
            host.endswith(domain) if domain.startswith('.') else host == domain for domain in self.domains)


class Fetcher:
    """Fetches, up to :data:`FETCHES` at a time, in threads of its own.

    Args:
        resolve: the addresses of a name.
    """

    def __init__(self, rules: FetchRules = FetchRules(), *, resolve: Resolve = resolve) -> None:
        self.rules, self._resolve = rules, resolve
        self._pool = ThreadPoolExecutor(FETCHES, thread_name_prefix='lmdeploy-fetch')
        self._tls: ssl.SSLContext | None = None

    async def fetch(self, url: str) -> bytes:
        """What lies at ``url``.

        Raises:
            Refused: it may not be fetched, or could not be.
        """
        target = Target.read(url)
        job = _Job(self, time.monotonic() + self.rules.seconds)
        future = asyncio.get_running_loop().run_in_executor(self._pool, job.run, target)
        try:
            return await asyncio.wait_for(asyncio.shield(future), self.rules.seconds)
        except TimeoutError:
            raise Refused(f'it takes more than {self.rules.seconds:g} s') from None
        finally:
            job.stop()  # also where nobody waits any more: a thread must not
            if future.done() and not future.cancelled():
                future.exception()

    def close(self) -> None:
        """Start no more fetches."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def addresses(self, target: Target) -> list[Address]:
        """Where ``target`` may be connected to.

        Raises:
            Refused: nowhere.
        """
        rules, literal = self.rules, _ip(target.host)
        if not rules.admits(target.host):
            raise Refused(f'{target.host} is not among the allowed domains')
        if literal is not None:
            found: list[Address | None] = [literal]
        else:
            try:
                found = [_ip(text.partition('%')[0]) for text in self._resolve(target.host, target.port)]
            except (OSError, UnicodeError) as error:
                raise Refused(f'{target.host} is not known: {error}') from error
        own = [address for address in found if address is not None and any(
            address in network for network in rules.networks if network.version == address.version)]
        if own and len(own) == len(found):
            return own
        addresses = [address for address in found if address is not None and is_public(address)]
        if not addresses or len(addresses) < len(found):
            raise Refused(f'{target.host} has an address that is not public')
        if target.port not in PORTS.values():
            raise Refused(f'port {target.port} is not one of the web')
        return addresses

    def tls(self) -> ssl.SSLContext:
        """With the certificates of this machine; what the environment says is not asked for."""
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


class _Job:
    """One fetch, in a thread. ``stop`` ends whatever it waits for."""

    def __init__(self, fetcher: Fetcher, deadline: float) -> None:
        self._fetcher, self._deadline = fetcher, deadline
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._stopped = False

    def run(self, target: Target) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            try:
                found = self._once(target)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise Refused(f'{target.host}: {type(error).__name__}: {error}') from error
            finally:
                self._close()
            if isinstance(found, bytes):
                return found
            target = found
        raise Refused('too many redirects')

    def stop(self) -> None:
        """Called from another thread."""
        with self._lock:
            self._stopped = True
            if self._socket is not None:
                try:
                    self._socket.shutdown(socket.SHUT_RDWR)
                except OSError:  # not connected yet, or not any more
                    pass

    def _once(self, target: Target) -> bytes | Target:
        """The body, or where to look instead."""
        address = self._fetcher.addresses(target)[0]
        sock = socket.create_connection((str(address), target.port), self._left())
        self._hold(sock)
        if target.scheme == 'https':
            sock = self._fetcher.tls().wrap_socket(sock, server_hostname=target.host)
            self._hold(sock)
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = sock
        connection.request('GET', target.path, headers={
            'Host': target.authority, 'User-Agent': f'lmdeploy/{__version__}', 'Accept': 'image/*',
            'Accept-Encoding': 'identity', 'Connection': 'close'})
        reply = connection.getresponse()
        if reply.status in REDIRECTS:
            return Target.read(urljoin(target.url, reply.headers.get('Location', '')))
        if reply.status != 200:
            raise Refused(f'{target.host} answers {reply.status}')
        if reply.headers.get('Content-Encoding', 'identity').lower() != 'identity':
            raise Refused(f'{target.host} sends compressed content, unasked')
        return self._body(reply)

    def _body(self, reply: http.client.HTTPResponse) -> bytes:
        most = self._fetcher.rules.max_bytes
        if (reply.length or 0) > most:
            raise Refused(f'{reply.length} bytes; {most} is the most')
        data = bytearray()
        while chunk := reply.read1(CHUNK):
            data += chunk
            if len(data) > most:
                raise Refused(f'more than {most} bytes')
            self._left()
        if reply.length:
            raise Refused('the connection ended before the picture did')
        return bytes(data)

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0 or self._stopped:
            raise Refused(f'it takes more than {self._fetcher.rules.seconds:g} s')
        return left

    def _hold(self, sock: socket.socket) -> None:
        with self._lock:
            self._socket = sock
            sock.settimeout(self._left())

    def _close(self) -> None:
        with self._lock:
            sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

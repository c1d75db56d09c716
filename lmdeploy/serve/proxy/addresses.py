"""Where a node may be: URLs that are parsed, resolved and checked once, and then pinned to the checked address.

Whoever registers a node makes the proxy send requests to a URL of their choice. So a URL has nothing but a scheme, a
host and a port; every address that its name stands for must lie in an allowed network; and connections go to the
checked address, so that a name cannot mean another machine later.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from lmdeploy.errors import ConfigError
from lmdeploy.serve.errors import HttpError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

RESOLVE_SECONDS = 5.0
MAX_URL = 300
HOST_NAME = re.compile(r'[a-z0-9](?:[a-z0-9._-]{0,251}[a-z0-9])?')
PRIVATE = tuple(map(ipaddress.ip_network, (
    '127.0.0.0/8', '::1/128', '10.0.0.0/8', '172.16.0.0/12', '192.168.0.0/16', 'fc00::/7')))
NEVER = tuple(map(ipaddress.ip_network, (
    '0.0.0.0/8', '::/128', '224.0.0.0/4', '240.0.0.0/4', 'ff00::/8',  # no single machine
    '169.254.0.0/16', 'fe80::/10', '192.0.0.0/24',  # link-local: where clouds keep the credentials of a machine
    '100.100.100.200/32', '168.63.129.16/32', 'fd00:ec2::/32', 'fd20:ce::/32')))  # and where others of them do


@dataclass(frozen=True, slots=True)
class NodeAddress:
    """A node's address.

    Attributes:
        url: ``scheme://host:port``, the one spelling of it.
        ip: where connections go.
    """

    scheme: str
    host: str
    port: int
    ip: str = ''

    @property
    def url(self) -> str:
        return f'{self.scheme}://{_bracket(self.host)}:{self.port}'

    @property
    def pinned(self) -> str:
        """The URL with the checked address in place of the name."""
        return f'{self.scheme}://{_bracket(self.ip)}:{self.port}'

    @property
    def authority(self) -> str:
        """The Host header."""
        return f'{_bracket(self.host)}:{self.port}'


def parse(url: str) -> NodeAddress:
    """A URL as an address that is not resolved yet.

    Raises:
        HttpError: LMD-561.
    """
    def refuse(reason: str) -> HttpError:
        return HttpError('LMD-561', url=url[:MAX_URL], reason=reason, param='url')

    if len(url) > MAX_URL or not url.isascii() or re.search(r'[\s\\%\x00-\x20\x7f]', url):
        raise refuse('it is too long, or has characters that no address has')
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise refuse(str(error)) from None
    if parts.scheme not in ('http', 'https'):
        raise refuse('it must begin with http:// or https://')
    if '@' in parts.netloc:
        raise refuse('it must not hold credentials')
    if parts.path not in ('', '/') or '?' in url or '#' in url:
        raise refuse('it must end after the port')
    host = (parts.hostname or '').lower().rstrip('.')
    literal = _ip(host)
    if literal is not None:
        host = str(literal)
    elif not HOST_NAME.fullmatch(host):
        raise refuse('its host is neither a name nor an IP address')
    if port == 0:
        raise refuse('no node has port 0')
    return NodeAddress(parts.scheme, host, port or {'http': 80, 'https': 443}[parts.scheme])


class AllowedNodes:
    """Which addresses nodes may have.

    Args:
        entries: networks (``10.1.0.0/16``), addresses and host names; none: loopback and private networks. Addresses
            that serve the credentials of machines, link-local and multicast ones are refused whatever the entries are.

    Raises:
        ConfigError: LMD-527, an entry is none of these.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self._networks: list[IPNetwork] = []
        self._names: set[str] = set()
        entries = list(entries)
        for entry in entries:
            try:
                self._networks.append(ipaddress.ip_network(entry))
            except ValueError:
                name = entry.lower().rstrip('.')
                if '/' in entry or not HOST_NAME.fullmatch(name) or name.replace('.', '').isdigit():
                    raise ConfigError('LMD-527', option='--allowed-nodes', value=entry,
                                      reason='it is no network, address or host name') from None
                self._names.add(name)
        if not entries:
            self._networks += PRIVATE

    def check(self, address: NodeAddress, ip: str) -> None:
        """Refuse an address of a node.

        Raises:
            HttpError: LMD-561.
        """
        found = _plain(ipaddress.ip_address(ip.partition('%')[0]))
        if any(found in network for network in NEVER if network.version == found.version):
            raise HttpError('LMD-561', url=address.url, reason='no node may be at that address', param='url')
        if address.host in self._names:
            return
        if not any(found in network for network in self._networks if network.version == found.version):
            raise HttpError('LMD-561', url=address.url, param='url',
                            reason='it is not in an allowed network (--allowed-nodes)')

    async def resolve(self, url: str) -> NodeAddress:
        """Parse, resolve and check a URL.

        Raises:
            HttpError: LMD-561.
        """
        address = parse(url)
        try:
            found = await asyncio.wait_for(asyncio.get_running_loop().getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM), RESOLVE_SECONDS)
        except (OSError, UnicodeError, asyncio.TimeoutError):
            raise HttpError('LMD-561', url=address.url, reason='its name cannot be resolved', param='url') from None
        addresses = sorted((str(entry[4][0]) for entry in found), key=lambda ip: (':' in ip, ip))  # always the same
        for ip in addresses:
            self.check(address, ip)
        return NodeAddress(address.scheme, address.host, address.port, addresses[0])


def _ip(text: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _plain(address: IPAddress) -> IPAddress:
    """The IPv4 address that an IPv6 one is a spelling of."""
    mapped = getattr(address, 'ipv4_mapped', None)
    return address if mapped is None else mapped


def _bracket(host: str) -> str:
    return f'[{host}]' if ':' in host else host

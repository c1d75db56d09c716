"""A server as a node of a proxy: it registers when it serves, again and again, and says when it leaves.

Registering again is the heartbeat towards the proxy: one that was started anew knows the server again within seconds.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from collections.abc import Callable, Sequence

import httpx

from lmdeploy.errors import LmdeployError
from lmdeploy.log import get_logger
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.fetch import UNSPECIFIED, Address
from lmdeploy.serve.proxy.links import reason_of

ASK_SECONDS = 10.0
LEAVE_SECONDS = 3.0
HEARTBEAT_SECONDS = 10.0
FIRST_RETRY = 1.0  # seconds after the first failure; doubled up to a heartbeat


class Membership:
    """Keeps a server registered.

    Args:
        proxy: where the proxy is.
        node_key: the proxy's key for nodes.
        url: where the proxy reaches this server.
        models: what it serves.
        joined: called when the proxy has taken it for the first time, and after every break.

    Attributes:
        api_key: what the proxy shows here; new for every start, and known to nobody else.
    """

    def __init__(self, proxy: Address, node_key: str, url: str, models: Sequence[str], *,
                 joined: Callable[[], None] = lambda: None) -> None:
        self.api_key = secrets.token_urlsafe(32)
        self._proxy, self._node_key, self._url, self._models = proxy, node_key, url, list(models)
        self._told = joined
        self._joined = False
        self._left = False
        self._client: httpx.AsyncClient | None = None

    async def run(self) -> None:
        """Register, and stay registered, until cancelled."""
        wait = FIRST_RETRY
        while not self._left:
            try:
                await self._post('/nodes/add', {'url': self._url, 'api_key': self.api_key,
                                                'status': {'models': self._models, 'role': 'Hybrid'}}, ASK_SECONDS)
            except LmdeployError as error:
                get_logger().error('%s', error)
                self._joined = False
                await asyncio.sleep(wait)
                wait = min(2 * wait, HEARTBEAT_SECONDS)
                continue
            if not self._joined:
                self._joined = True
                self._told()
            wait = FIRST_RETRY
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def leave(self) -> None:
        """Tell the proxy to send nothing more. Safe to call twice."""
        if self._left:
            return
        self._left = True
        if self._joined:
            try:
                await self._post('/nodes/remove', {'url': self._url}, LEAVE_SECONDS)
            except LmdeployError as error:
                get_logger().warning('%s', error)

    async def close(self) -> None:
        """Close the connection to the proxy."""
        if self._client is not None:
            await self._client.aclose()

    async def _post(self, path: str, body: dict[str, object], seconds: float) -> None:
        """Raises: HttpError LMD-569, the proxy is not there, or does not want it."""
        if self._client is None:
            self._client = httpx.AsyncClient(base_url=self._proxy.url, trust_env=False, follow_redirects=False,
                                             verify=ssl.create_default_context())
        try:
            answer = await asyncio.wait_for(self._client.post(
                path, json=body, headers={'authorization': f'Bearer {self._node_key}'}, timeout=seconds), seconds)
        except (httpx.HTTPError, asyncio.TimeoutError) as error:
            raise HttpError('LMD-569', url=self._proxy.url, reason=reason_of(error)) from error
        if answer.status_code != 200:
            raise HttpError('LMD-569', url=self._proxy.url,
                            reason=f'{answer.status_code} {" ".join(answer.text.split())[:300]}')


def reachable_url(scheme: str, host: str, port: int, proxy: Address) -> str:
    """The URL under which ``proxy`` reaches a server that listens on ``host``: if that means all addresses of this
    machine, the one from which the way to the proxy leads."""
    if host in UNSPECIFIED or not host:
        try:
            family, kind, protocol, _, target = socket.getaddrinfo(proxy.host, proxy.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as sock:  # no packet is sent
                sock.connect(target)
                host = sock.getsockname()[0]
        except OSError:
            host = socket.gethostname()
    return f'{scheme}://[{host}]:{port}' if ':' in host else f'{scheme}://{host}:{port}'

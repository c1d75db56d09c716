"""Connections to nodes: one pool of HTTP connections each, to the address that was checked at its registration."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx

from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.listener import STARVED
from lmdeploy.serve.middleware import Header
from lmdeploy.serve.proxy.nodes import Node

CONNECT_SECONDS = 2.0
WRITE_SECONDS = 30.0
PROBE_SECONDS = 5.0
KEEP_SECONDS = 3.0  # idle connections; less than the 5 seconds after which servers close them
KEEP_IDLE = 64
MAX_ANSWER = 1 << 20  # of what the proxy itself asks


class Links:
    """HTTP clients by node. Proxies of the environment are not used, and redirects are not followed.

    Args:
        tls: how ``https`` nodes are trusted.
    """

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._tls = tls
        self._clients: dict[Node, httpx.AsyncClient] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def open(self, node: Node, method: str, path: str, headers: Sequence[Header] = (),
                   body: bytes | None = None, *, silence: float | None) -> httpx.Response:
        """Send a request; returns when the head of the answer is here. Close the response.

        Args:
            silence: seconds without a byte after which the node is given up; None: never.

        Raises:
            httpx.HTTPError: the node cannot be reached, broke off, or was silent.
        """
        client = self._clients.get(node)
        if client is None:
            client = self._clients[node] = self._client()
        extensions = {'sni_hostname': node.address.host} if node.address.scheme == 'https' else {}
        request = client.build_request(
            method, node.address.pinned + path, headers=list(headers), content=body, extensions=extensions,
            timeout=httpx.Timeout(silence, connect=CONNECT_SECONDS, write=WRITE_SECONDS))
        return await client.send(request, stream=True)

    def _client(self) -> httpx.AsyncClient:
        client = httpx.AsyncClient(
            verify=self._tls, trust_env=False, follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # a node's cookies are remembered for nobody
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=KEEP_IDLE,
                                keepalive_expiry=KEEP_SECONDS))
        client.headers.clear()  # what is sent is what was given
        return client

    async def ask(self, node: Node, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """A short question of the proxy itself: the status and the body of the answer.

        Raises:
            HttpError: LMD-570, with the reason.
        """
        try:
            return await asyncio.wait_for(self._ask(node, method, path, body), PROBE_SECONDS)
        except asyncio.TimeoutError:
            raise HttpError('LMD-570', url=node.url, reason=f'no answer within {PROBE_SECONDS:g} seconds') from None
        except httpx.HTTPError as error:
            raise HttpError('LMD-570', url=node.url, reason=reason_of(error)) from error

    async def _ask(self, node: Node, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        headers = [(b'host', node.address.authority.encode()), (b'accept-encoding', b'identity')]
        if node.api_key is not None:
            headers.append((b'authorization', b'Bearer ' + node.api_key.encode()))
        if body is not None:
            headers.append((b'content-type', b'application/json'))
        response = await self.open(node, method, path, headers, body, silence=PROBE_SECONDS)
        try:
            found = bytearray()
            async for chunk in response.aiter_raw():
                found += chunk
                if len(found) > MAX_ANSWER:
                    raise HttpError('LMD-570', url=node.url, reason=f'it sends more than {MAX_ANSWER} bytes')
            return response.status_code, bytes(found)
        finally:
            await response.aclose()

    def drop(self, node: Node) -> None:
        """Close the connections of a node that has left, when its last request has ended."""
        client = self._clients.pop(node, None)
        if client is not None:
            task = asyncio.get_running_loop().create_task(_close(node, client))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all connections."""
        clients, self._clients = list(self._clients.values()), {}
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*(client.aclose() for client in clients))


async def _close(node: Node, client: httpx.AsyncClient) -> None:
    try:
        while node.unfinished:
            await asyncio.sleep(1.0)
    finally:
        await client.aclose()


def reason_of(error: Exception) -> str:
    """What went wrong, for the log and the status of a node."""
    return f'{type(error).__name__}: {error}'[:200] if str(error) else type(error).__name__


def starved(error: BaseException | None) -> bool:
    """Whether a connection failed for want of descriptors here: no node is to blame for that."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in STARVED:
            return True
        error = error.__cause__ or error.__context__
    return False

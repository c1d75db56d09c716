"""A request's way through the proxy: to the first node, to the next one as long as nothing was sent to the client, and
the bytes of the answer back as they come.

Nothing has been sent until a node has sent the first byte of its body. Whatever fails before that happens elsewhere
again: the connection, a node that dies, one that is taken out while it is waited for, one that says 503 or refuses the
proxy's own key. After it, a failure ends the answer with an error that the client sees. A request on which two nodes
have died is not sent to a third: it may be the cause.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import httpx

from lmdeploy.log import get_logger
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.http import Chunks
from lmdeploy.serve.middleware import Header
from lmdeploy.serve.proxy import headers as fields
from lmdeploy.serve.proxy.asked import Asked
from lmdeploy.serve.proxy.events import EventCutter
from lmdeploy.serve.proxy.links import Links, reason_of, starved
from lmdeploy.serve.proxy.nodes import Node, NodeTable
from lmdeploy.serve.proxy.strategies import Strategy

MOST_TRIES = 4
MOST_DEATHS = 2  # of nodes that had the request


@dataclass(frozen=True, slots=True)
class Call:
    """A client's request as far as nodes are concerned."""

    path: str
    headers: Sequence[Header]
    body: bytes
    asked: Asked
    request_id: str
    caller: str


@dataclass(slots=True)
class Passage:
    """An answer on its way through.

    Attributes:
        chunks: the body as it comes. Close it.
        events: it is an event stream, in which an error can follow.
    """

    status: int = 0
    headers: list[Header] = field(default_factory=list)
    node: str = ''
    events: bool = False
    chunks: Chunks | None = None


class NodeError(Exception):
    """A node did not answer as it should; the text is for the log.

    Attributes:
        certain: nobody listens there.
        silent: it may be at work on the request.
        dead: it had the request, and broke off.
    """

    def __init__(self, reason: str, *, certain: bool = False, silent: bool = False, dead: bool = False) -> None:
        super().__init__(reason)
        self.certain, self.silent, self.dead = certain, silent, dead


class Forwarder:
    """Sends requests to nodes.

    Args:
        silence: seconds without a byte of a stream after which its node is given up.
        retries: counts, by reason, how often a request went to another node.
    """

    def __init__(self, nodes: NodeTable, links: Links, strategy: Strategy, *, silence: float, chance: random.Random,
                 retries: Counter[str]) -> None:
        self._nodes, self._links, self._strategy, self._silence = nodes, links, strategy, silence
        self._chance, self._retries = chance, retries

    async def send(self, call: Call, passage: Passage) -> None:
        """Fill ``passage`` with the answer of the first node that begins one.

        Raises:
            HttpError: LMD-514, LMD-562, LMD-563: no node is there for the model; LMD-564, all have failed; LMD-566, the
                node was silent.
        """
        order = self._strategy(self._nodes.serving(self._model(call.asked)), call.asked.affinity, self._chance)
        order = order[:MOST_TRIES]
        failed = deaths = 0
        for left, node in zip(reversed(range(len(order))), order):
            try:
                await self._try(node, call, passage)
            except NodeError as error:
                get_logger().warning('request %s: node %s: %s', call.request_id, node.url, error)
                node.fail(str(error), certain=error.certain)
                if error.silent:  # it may be at work on it: not again
                    raise HttpError('LMD-566', seconds=self._silence) from error
                failed += 1
                deaths += error.dead
                if deaths == MOST_DEATHS:
                    break
                self._retries['failed'] += bool(left)
                continue
            if passage.status == 503 and left:
                assert passage.chunks is not None
                await passage.chunks.aclose()
                self._retries['busy'] += 1
                continue
            return
        raise HttpError('LMD-564', tried=failed, retry_after=1)

    def _model(self, asked: Asked) -> str:
        """The model of a request; where all nodes serve one and the same, it need not be named."""
        if asked.model is not None:
            return asked.model
        served = self._nodes.models()
        if len(served) == 1:
            return served[0]
        if not served:
            raise HttpError('LMD-562', model='', retry_after=5)
        raise HttpError('LMD-563', served=', '.join(served)[:1000], param='model')

    async def _try(self, node: Node, call: Call, passage: Passage) -> None:
        """Wait until the node has sent the head and the first piece of its answer, or is taken out.

        Raises:
            NodeError: it has not.
        """
        passage.node, passage.chunks = node.url, None
        chunks = self._chunks(node, call, passage)
        first = asyncio.ensure_future(first_of(chunks))
        lost = asyncio.ensure_future(node.lost.wait())
        try:
            await asyncio.wait({first, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                raise NodeError('it was taken out before it answered', dead=True)
            passage.chunks = Begun(first.result(), chunks)
        finally:
            lost.cancel()
            if passage.chunks is None:
                first.cancel()
                await asyncio.wait({first})
                await chunks.aclose()

    async def _chunks(self, node: Node, call: Call, passage: Passage) -> AsyncGenerator[bytes, None]:
        """The body of the node's answer; its head is in ``passage`` before the first piece comes.

        Raises:
            NodeError: before or in the middle of it.
        """
        started = time.monotonic()
        sent = fields.to_node(call.headers, authority=node.address.authority, request_id=call.request_id,
                              caller=call.caller, key=node.api_key)
        with node.request():
            try:
                response = await self._links.open(node, 'POST', call.path, sent, call.body,
                                                  silence=self._silence if call.asked.stream else None)
            except httpx.ConnectTimeout as error:
                raise NodeError(reason_of(error)) from error
            except httpx.ConnectError as error:
                if starved(error):
                    raise HttpError('LMD-572', retry_after=1) from error
                raise NodeError(reason_of(error), certain=True) from error
            except httpx.TimeoutException as error:
                raise NodeError(reason_of(error), silent=True) from error
            except httpx.LocalProtocolError as error:  # of the request, not of the node
                raise HttpError('LMD-512', param='headers', reason='a header field cannot be passed on') from error
            except httpx.HTTPError as error:
                raise NodeError(reason_of(error), dead=True) from error
            try:
                self._begin(response, passage)
                async for chunk in response.aiter_raw():
                    if chunk:
                        yield chunk
            except httpx.HTTPError as error:
                silent = isinstance(error, httpx.TimeoutException)
                raise NodeError(reason_of(error), silent=silent, dead=not silent) from error
            finally:
                await response.aclose()
        node.finished(time.monotonic() - started if response.status_code < 400 else None)

    def _begin(self, response: httpx.Response, passage: Passage) -> None:
        status = response.status_code
        if status in (401, 403):
            raise NodeError("it refuses the proxy's key")
        if status < 200 or 300 <= status < 400:
            raise NodeError(f'it answers with status {status}')
        passage.status = status
        passage.headers = fields.to_client(response.headers.raw)
        kind = response.headers.get('content-type', '').partition(';')[0].strip().lower()
        passage.events = (kind == 'text/event-stream' and 'content-length' not in response.headers
                          and response.headers.get('content-encoding', 'identity') == 'identity')

    async def body(self, call: Call, passage: Passage) -> AsyncGenerator[bytes, None]:
        """The answer's bytes, of an event stream in whole events.

        Raises:
            HttpError: LMD-565, the node broke off; LMD-566, it was silent.
        """
        assert passage.chunks is not None
        cutter = EventCutter() if passage.events else None
        async with aclosing(passage.chunks) as chunks:
            try:
                async for chunk in chunks:
                    if cutter is not None:
                        chunk = cutter.push(chunk)
                    if chunk:
                        yield chunk
            except NodeError as error:
                get_logger().warning('request %s: node %s, in the middle: %s', call.request_id, passage.node, error)
                node = self._nodes.get(passage.node)
                if node is not None:
                    node.fail(str(error))
                if error.silent:
                    raise HttpError('LMD-566', seconds=self._silence) from error
                raise HttpError('LMD-565') from error
            if cutter is not None and (rest := cutter.flush()):
                yield rest


async def first_of(chunks: Chunks) -> bytes | None:
    """The first piece; None: there is none."""
    try:
        return await anext(chunks)
    except StopAsyncIteration:
        return None


class Begun:
    """Pieces of which the first was taken already. Closing them closes where they come from, even if none was read."""

    def __init__(self, first: bytes | None, rest: Chunks) -> None:
        self._first, self._rest = first, rest

    def __aiter__(self) -> Begun:
        return self

    async def __anext__(self) -> bytes:
        first, self._first = self._first, None
        return await anext(self._rest) if first is None else first

    async def aclose(self) -> None:
        await self._rest.aclose()

"""The routes about nodes: they come, go, and are listed. All of them need the node key."""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
from pydantic import Field

from lmdeploy.serve.body import Body
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.http import Response, json_reply
from lmdeploy.serve.middleware import parse_json
from lmdeploy.serve.proxy.addresses import NodeAddress, parse
from lmdeploy.serve.proxy.context import ProxyContext
from lmdeploy.serve.proxy.nodes import Node

MOST_MODELS = 64
Name = Annotated[str, Field(min_length=1, max_length=512)]
HYBRID = (None, 'Hybrid', 1)
"""Spellings of the one role that there is: a node reads prompts and writes answers."""


class NodeStatusBody(Body):
    """What a node says of itself. What it says of its load is left out: the proxy counts by itself."""

    models: list[Name] | None = Field(None, max_length=MOST_MODELS)
    role: str | int | None = None
    speed: float | None = Field(None, gt=0, le=1e9)
    unfinished: int | None = None
    latency: list[Any] | None = None


class NodeBody(Body):
    """A node that registers.

    Attributes:
        api_key: what the proxy shall show to the node.
    """

    url: str
    status: NodeStatusBody | None = None
    api_key: str | None = Field(None, min_length=1, max_length=4096, pattern='^[!-~]+$')


class NodeUrlBody(Body):
    """A node by its URL."""

    url: str


class NodeStatus(msgspec.Struct):
    """A node as ``/nodes/status`` lists it. ``latency``: seconds of the last answers; ``up``: it gets requests;
    ``reason``: why it does not."""

    models: list[str]
    role: str
    speed: float | None
    unfinished: int
    latency: list[float]
    up: bool
    served: int
    failures: int
    reason: str


class Done(msgspec.Struct):
    """What was done."""

    message: str
    heartbeat_seconds: float | msgspec.UnsetType = msgspec.UNSET


class Registry:
    """The handlers, over a proxy's context."""

    def __init__(self, context: ProxyContext) -> None:
        self.context = context

    async def status(self) -> Response:
        """All nodes by their URL."""
        return json_reply({node.url: _status(node) for node in self.context.nodes})

    async def add(self, body: NodeBody) -> Response:
        """Register a node, or again: ``heartbeat_seconds`` says how often is good."""
        context = self.context
        if context.draining:
            raise HttpError('LMD-520', retry_after=5)
        status = body.status or NodeStatusBody(models=None, speed=None)
        if status.role not in HYBRID:
            raise HttpError('LMD-561', url=body.url[:300], param='status.role',
                            reason='nodes that only read prompts or only write answers are not supported')
        address = await context.allowed.resolve(body.url)
        key = body.api_key or context.node_api_key
        models = status.models or await self._ask_models(address, key)
        context.nodes.add(address, tuple(dict.fromkeys(models)), status.speed, key)
        return json_reply(Done('Added successfully', context.heartbeat_seconds))

    async def remove(self, body: NodeUrlBody) -> Response:
        """Forget a node; what it has begun to answer is still passed on."""
        self.context.nodes.remove(_known(body.url))
        return json_reply(Done('Deleted successfully'))

    async def terminate(self, body: NodeUrlBody) -> Response:
        """Shut a node down, if it lets the proxy, and forget it."""
        url = _known(body.url)
        node = self.context.nodes.get(url)
        if node is None:
            raise HttpError('LMD-568', url=url, param='url')
        await self._end(node)
        return json_reply(Done('Terminated successfully'))

    async def terminate_all(self) -> Response:
        """Shut all nodes down."""
        failed = []
        for node in self.context.nodes:
            try:
                await self._end(node)
            except HttpError as error:
                failed.append(error)
        if failed:
            raise failed[0]
        return json_reply(Done('All nodes terminated successfully'))

    async def _end(self, node: Node) -> None:
        status, _ = await self.context.links.ask(node, 'POST', '/terminate')
        if status != 200:
            raise HttpError('LMD-570', url=node.url, reason=f'its /terminate says {status}')
        self.context.nodes.remove(node.url)

    async def _ask_models(self, address: NodeAddress, key: str | None) -> list[str]:
        """What the node itself says it serves.

        Raises:
            HttpError: LMD-570.
        """
        node = Node(address, (), api_key=key)
        try:
            status, found = await self.context.links.ask(node, 'GET', '/v1/models')
        finally:
            self.context.links.drop(node)
        try:
            cards = parse_json(found, self.context.limits)['data'] if status == 200 else []
            models = [card['id'] for card in cards if isinstance(card['id'], str) and 0 < len(card['id']) <= 512]
        except (HttpError, TypeError, LookupError):
            models = []
        if not 0 < len(models) <= MOST_MODELS:
            raise HttpError('LMD-570', url=address.url, reason=f'its /v1/models (status {status}) names no models')
        return models


def _known(url: str) -> str:
    """The one spelling of a URL."""
    return parse(url).url


def _status(node: Node) -> NodeStatus:
    latency = [round(seconds, 4) for _, seconds in node.latencies if math.isfinite(seconds)]
    return NodeStatus(list(node.models), 'Hybrid', node.speed, node.unfinished, latency, node.up, node.served,
                      node.failures, node.reason)

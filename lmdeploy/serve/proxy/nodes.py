"""The nodes that the proxy knows: what each serves, how busy and how quick it is, and whether it answers.

A node is *up* from its registration on. It is *down* after :data:`MOST_FAILURES` failures in a row, or at once where
nobody listens; it then gets no requests until it answers a probe. A node that is down for :data:`FORGET_SECONDS` is
forgotten. Only the event loop's thread touches nodes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lmdeploy.log import get_logger
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.proxy.addresses import NodeAddress

MOST_NODES = 1024
MOST_FAILURES = 3
FORGET_SECONDS = 3600.0
REST_SECONDS = 10.0  # for a node that failed again and again, whatever its /health says
LATENCIES = 15  # observed, of one node
LATENCY_SECONDS = 60.0  # after which an observation no longer counts: a node that was slow gets another chance
Clock = Callable[[], float]


@dataclass(slots=True, eq=False)
class Node:
    """One server.

    Attributes:
        models: the names that requests may give.
        speed: relative, as declared; None: it was not.
        api_key: the proxy's own key there; None: the node asks for none.
        unfinished: requests that are on the node now.
        latencies: ``(time, seconds)`` of the last answers.
        failures: in a row.
        lost: is set when the node goes down; what waits for its first byte then waits no longer.
    """

    address: NodeAddress
    models: tuple[str, ...]
    speed: float | None = None
    api_key: str | None = field(default=None, repr=False)
    clock: Clock = time.monotonic
    unfinished: int = 0
    served: int = 0
    latencies: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=LATENCIES))
    failures: int = 0
    down_since: float | None = None
    probe_at: float = 0.0  # not before, while it is down
    reason: str = ''
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return self.address.url

    @property
    def up(self) -> bool:
        return self.down_since is None

    @property
    def latency(self) -> float | None:
        """Mean seconds of the last minute's answers; None: there were none."""
        since = self.clock() - LATENCY_SECONDS
        recent = [seconds for when, seconds in self.latencies if when >= since]
        return sum(recent) / len(recent) if recent else None

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it is on the node."""
        self.unfinished += 1
        try:
            yield
        finally:
            self.unfinished -= 1

    def finished(self, seconds: float | None) -> None:
        """The node has answered a request to the end, in so many seconds; None: the answer was an error."""
        self.failures = 0
        self.served += 1
        if seconds is not None:
            self.latencies.append((self.clock(), seconds))

    def fail(self, reason: str, *, certain: bool = False) -> None:
        """The node did not do what it should. ``certain``: nobody listens there."""
        self.failures += 1
        if self.up and (certain or self.failures >= MOST_FAILURES):
            self.down(reason)

    def down(self, reason: str) -> None:
        """Take it out."""
        get_logger().warning('node %s is taken out: %s', self.url, reason)
        self.down_since, self.reason = self.clock(), reason
        self.probe_at = self.clock() + (REST_SECONDS if self.failures >= MOST_FAILURES else 0.0)
        self.lost.set()

    def answered(self) -> None:
        """It answers a probe: it is in again."""
        self.failures = 0
        if not self.up:
            get_logger().warning('node %s is back', self.url)
            self.down_since, self.reason = None, ''
            self.lost = asyncio.Event()


class NodeTable:
    """The nodes by their URL.

    Args:
        changed: called after nodes or what they serve have changed.
        left: called with a node that is no longer in the table.
    """

    def __init__(self, *, clock: Clock = time.monotonic, changed: Callable[[], None] = lambda: None,
                 left: Callable[[Node], None] = lambda node: None) -> None:
        self._nodes: dict[str, Node] = {}
        self._clock, self._changed, self._left = clock, changed, left

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._nodes.values()))

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, url: str) -> Node | None:
        return self._nodes.get(url)

    def add(self, address: NodeAddress, models: tuple[str, ...], speed: float | None = None,
            api_key: str | None = None) -> Node:
        """Add a node, or bring what is known of it up to date: nodes register again and again.

        Raises:
            HttpError: LMD-567, there are too many.
        """
        node = self._nodes.get(address.url)
        if node is not None and node.address == address and node.api_key == api_key:
            if (node.models, node.speed) != (models, speed):
                node.models, node.speed = models, speed
                self._changed()
            return node
        if node is None and len(self._nodes) >= MOST_NODES:
            raise HttpError('LMD-567', most=MOST_NODES)
        if node is not None:
            self._drop(node)
        node = self._nodes[address.url] = Node(address, models, speed, api_key, self._clock)
        get_logger().info('node %s serves %s', node.url, ', '.join(models))
        self._changed()
        return node

    def remove(self, url: str) -> Node:
        """Take a node out for good; what it has begun to answer is still passed on.

        Raises:
            HttpError: LMD-568, there is no such node.
        """
        node = self._nodes.get(url)
        if node is None:
            raise HttpError('LMD-568', url=url[:300], param='url')
        self._drop(node)
        self._changed()
        return node

    def forget(self) -> None:
        """Remove the nodes that were down for too long."""
        for node in self:
            if node.down_since is not None and self._clock() - node.down_since > FORGET_SECONDS:
                self.remove(node.url)

    def models(self) -> list[str]:
        """What the nodes that are up serve."""
        return sorted({model for node in self if node.up for model in node.models})

    def serving(self, model: str) -> list[Node]:
        """The nodes that are up and serve ``model``.

        Raises:
            HttpError: LMD-514, no node has ever heard of it; LMD-562, none that serves it is there now.
        """
        nodes = [node for node in self if model in node.models]
        if not nodes and self._nodes:
            raise HttpError('LMD-514', model=model[:200], served=', '.join(self.models())[:1000], param='model')
        found = [node for node in nodes if node.up]
        if not found:
            raise HttpError('LMD-562', model=model[:200], retry_after=5)
        return found

    def _drop(self, node: Node) -> None:
        del self._nodes[node.url]
        self._left(node)

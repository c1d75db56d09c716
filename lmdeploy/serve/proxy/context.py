"""ProxyContext: everything that the routes of one proxy share."""

from __future__ import annotations

import random
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field

from lmdeploy.errors import LmdeployError
from lmdeploy.log import get_logger
from lmdeploy.serve.admission import Admission
from lmdeploy.serve.auth import Access, Caller, Headers, KeyRing
from lmdeploy.serve.deadline import Deadline
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.meter import Meter
from lmdeploy.serve.middleware import Cors
from lmdeploy.serve.proxy.addresses import AllowedNodes
from lmdeploy.serve.proxy.forward import Forwarder
from lmdeploy.serve.proxy.links import Links
from lmdeploy.serve.proxy.metrics import ProxyMetrics
from lmdeploy.serve.proxy.nodes import NodeTable
from lmdeploy.serve.proxy.state import StateFile
from lmdeploy.serve.proxy.strategies import STRATEGIES
from lmdeploy.serve.proxy.watch import Watch

NO_BATCH = 1 << 30  # the proxy has no batch: what waits does so on the nodes


class ProxyKeys(KeyRing):
    """The keys of clients, and apart from them that of nodes, which opens the routes about nodes and nothing else."""

    def __init__(self, api_keys: Iterable[str], node_key: str) -> None:
        super().__init__(api_keys)
        self._nodes = KeyRing([node_key])

    def identify(self, headers: Headers, access: Access) -> Caller:
        """See :meth:`KeyRing.identify`.

        Raises:
            HttpError: LMD-560, an administrative route without the node key.
        """
        if access is not Access.ADMIN:
            return super().identify(headers, access)
        try:
            return self._nodes.identify(headers, Access.USER)
        except HttpError:
            raise HttpError('LMD-560') from None

    def permit(self, caller: Caller, access: Access) -> None:
        """The key that was asked for is the permission."""


@dataclass(slots=True)
class ProxyContext:
    """One proxy's state. Only its event loop's thread changes it.

    Args:
        keys: of clients and nodes.
        allowed: where nodes may be.
        strategy: a name of :data:`lmdeploy.serve.proxy.strategies.STRATEGIES`.
        node_api_key: what the proxy shows to nodes that gave it no key of their own.
        heartbeat_seconds: between two questions for a node's health.
        silence_seconds: without a byte of a stream after which its node is given up.
        state: where the nodes are kept; None: nowhere.
    """

    keys: ProxyKeys
    allowed: AllowedNodes = field(default_factory=AllowedNodes)
    limits: Limits = field(default_factory=Limits)
    cors: Cors = field(default_factory=Cors)
    strategy: str = 'min_expected_latency'
    node_api_key: str | None = None
    heartbeat_seconds: float = 10.0
    silence_seconds: float = 120.0
    state: StateFile | None = None
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)
    check_host: bool = False
    public_metrics: bool = False
    docs: bool = True
    audit: None = None
    created: int = 0
    draining: bool = False
    metrics: ProxyMetrics = field(default_factory=ProxyMetrics)
    deadlines: set[Deadline] = field(default_factory=set)
    chance: random.Random = field(default_factory=random.Random)
    admission: Admission = field(init=False)
    links: Links = field(init=False)
    nodes: NodeTable = field(init=False)
    forwarder: Forwarder = field(init=False)
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.admission = Admission(self.limits, batch=NO_BATCH)
        self.links = Links(self.tls)
        self.nodes = NodeTable(changed=self._changed, left=self.links.drop)
        self.forwarder = Forwarder(self.nodes, self.links, STRATEGIES[self.strategy], silence=self.silence_seconds,
                                   chance=self.chance, retries=self.metrics.retries)
        self.watch = Watch(self.nodes, self.links, self.heartbeat_seconds)

    async def restore(self) -> None:
        """Know again the nodes that were there when the proxy ended; those that may no longer be are left out.

        Raises:
            ConfigError: LMD-571.
        """
        if self.state is None:
            return
        for saved in self.state.read():
            try:
                self.nodes.add(await self.allowed.resolve(saved.url), saved.models, saved.speed, self.node_api_key)
            except LmdeployError as error:
                get_logger().warning('a node of the last time is left out: %s', error)

    async def close(self) -> None:
        """Write what is to be written, and close all connections to nodes."""
        if self.state is not None:
            self.state.flush(self.nodes, self.node_api_key)
        await self.links.close()

    def meter(self) -> Meter:
        """The line about the last seconds."""
        before = [self.metrics.accepted]

        def line(seconds: float) -> str:
            m = self.metrics
            if m.accepted == before[0] and not m.in_flight:
                return ''
            before[0] = m.accepted
            return (f'nodes {sum(node.up for node in self.nodes)} of {len(self.nodes)}, running {m.in_flight}, '
                    f'finished {m.finished}, failed {m.failed}, cancelled {m.cancelled}, '
                    f'retries {sum(m.retries.values())}')

        return line

    def _changed(self) -> None:
        if self.state is not None:
            self.state.later(self.nodes, self.node_api_key)

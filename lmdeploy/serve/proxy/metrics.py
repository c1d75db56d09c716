"""What the proxy counts, and its Prometheus form.

At every scrape ``accepted == finished + failed + cancelled + in flight``. A request is accepted when the proxy takes it
on; what is turned away before that is ``rejected``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmdeploy.serve.ledger import Ledger

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from lmdeploy.serve.proxy.nodes import NodeTable


@dataclass(slots=True)
class ProxyMetrics(Ledger):
    """Everything that the proxy counts."""

    retries: Counter[str] = field(default_factory=Counter)  # by reason


class ProxyExposition:
    """The counts as Prometheus metrics, all taken at one moment."""

    def __init__(self, metrics: ProxyMetrics, nodes: NodeTable) -> None:
        self._metrics, self._nodes = metrics, nodes

    def render(self) -> bytes:
        """The text that a scrape gets."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """The metrics, for a registry of prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        m, nodes = self._metrics, list(self._nodes)

        def counter(name: str, help: str, counts: dict[str, float], label: str = '') -> Metric:
            family = CounterMetricFamily(f'lmdeploy:proxy_{name}', help, labels=[label] if label else [])
            for key, value in counts.items():
                family.add_metric([key] if label else [], value)
            return family

        def gauge(name: str, help: str, values: dict[str, float], label: str = '') -> Metric:
            family = GaugeMetricFamily(f'lmdeploy:proxy_{name}', help, labels=[label] if label else [])
            for key, value in values.items():
                family.add_metric([key] if label else [], value)
            return family

        yield counter('requests_accepted', 'requests that the proxy took on', {'': m.accepted})
        yield counter('requests_finished', 'of these, those passed through to the end', {'': m.finished})
        yield counter('requests_failed', 'of these, those that ended with an error of the proxy', {'': m.failed})
        yield counter('requests_cancelled', 'of these, those whose client left, or that were given up',
                      {'': m.cancelled})
        yield gauge('requests_in_flight', 'of these, those that run now', {'': m.in_flight})
        yield counter('requests_rejected', 'requests that were turned away', dict(m.rejected), 'code')
        yield counter('http_responses', 'responses by status', {str(k): v for k, v in m.responses.items()}, 'status')
        yield counter('retries', 'requests that went to another node, by reason', dict(m.retries), 'reason')
        yield gauge('event_loop_lag_seconds', 'how late the event loop was, at worst in the last half minute',
                    {'': m.lag.worst})
        yield gauge('node_up', 'whether a node gets requests', {node.url: node.up for node in nodes}, 'node')
        yield gauge('node_unfinished', 'requests that are on a node', {node.url: node.unfinished for node in nodes},
                    'node')
        yield counter('node_served', 'requests that a node has answered', {node.url: node.served for node in nodes},
                      'node')

"""Counts of the server and their Prometheus form, under LMDeploy's names.

Requests are counted by the event loop's thread only, so that at every scrape ``accepted == finished + failed +
cancelled + in flight``. A request is accepted when its fields are valid and the server takes it on; everything turned
away before that is ``rejected``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmdeploy.serve.ledger import Ledger

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from lmdeploy.engine.metrics import EngineStats

TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000)
RATIOS = tuple(i / 10 for i in range(11))
FIRST_TOKEN = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
PER_TOKEN = (.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 10, 20, 40, 80)
REQUEST = (.05, .1, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class Histogram:
    """Counts of observed values by upper bound."""

    __slots__ = ('bounds', 'counts', 'total')

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.total += value
        for i, bound in enumerate(self.bounds):
            if value <= bound:
                self.counts[i] += 1
                return
        self.counts[-1] += 1

    def cumulative(self) -> list[tuple[str, float]]:
        """``(upper bound, how many were not above it)``, up to ``+Inf``."""
        found, count = [], 0
        for bound, here in zip((*self.bounds, float('inf')), self.counts):
            count += here
            found.append(('+Inf' if bound == float('inf') else repr(float(bound)), float(count)))
        return found


HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    'request_prompt_tokens': ('prompt tokens of a request', TOKENS),
    'request_generation_tokens': ('generated tokens of a request', TOKENS),
    'request_cached_tokens': ('prompt tokens of a request that the prefix cache answered', TOKENS),
    'request_cache_hit_ratio': ('share of the prompt that the prefix cache answered', RATIOS),
    'time_to_first_token_seconds': ('from the arrival of a request to its first token', FIRST_TOKEN),
    'time_per_output_token_seconds': ('mean time between the tokens of a request', PER_TOKEN),
    'iter_token_latency': ('time between two pieces of an answer', PER_TOKEN),
    'e2e_request_latency_seconds': ('from the arrival of a request to its end', REQUEST),
    'request_queue_time_seconds': ('from the arrival of a request until it was handed to the engine', REQUEST),
    'request_inference_time_seconds': ('from the engine taking a request to its end', REQUEST),
    'request_prefill_time_seconds': ('from the engine taking a request to its first token', REQUEST),
    'request_decode_time_seconds': ('from the first token of a request to its last', REQUEST),
}


@dataclass(slots=True)
class ServerMetrics(Ledger):
    """Everything that the server counts."""

    finish_reasons: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0
    audit_dropped: int = 0
    histograms: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()})


@dataclass(slots=True)
class Clock:
    """When the pieces of one answer came; tells the histograms at its end."""

    metrics: ServerMetrics
    arrived: float
    submitted: float = 0.0
    first: float = 0.0
    last: float = 0.0

    def submit(self) -> None:
        self.submitted = time.monotonic()
        self.metrics.histograms['request_queue_time_seconds'].observe(self.submitted - self.arrived)

    def token(self) -> None:
        """A piece with at least one token."""
        now = time.monotonic()
        histograms = self.metrics.histograms
        if not self.first:
            self.first = now
            histograms['time_to_first_token_seconds'].observe(now - self.arrived)
            histograms['request_prefill_time_seconds'].observe(now - self.submitted)
        else:
            histograms['iter_token_latency'].observe(now - self.last)
        self.last = now

    def end(self, reason: str, prompt: int, generated: int, cached: int) -> None:
        """The answer is over."""
        metrics, histograms, now = self.metrics, self.metrics.histograms, time.monotonic()
        metrics.finish_reasons[reason] += 1
        metrics.prompt_tokens += prompt
        metrics.generation_tokens += generated
        metrics.cached_tokens += cached
        for name, value in (('request_prompt_tokens', prompt), ('request_generation_tokens', generated),
                            ('request_cached_tokens', cached), ('request_cache_hit_ratio', cached / max(prompt, 1)),
                            ('e2e_request_latency_seconds', now - self.arrived),
                            ('request_inference_time_seconds', now - self.submitted)):
            histograms[name].observe(value)
        if self.first:
            histograms['request_decode_time_seconds'].observe(now - self.first)
            if generated > 1:
                histograms['time_per_output_token_seconds'].observe((self.last - self.first) / (generated - 1))


class Exposition:
    """The counts as Prometheus metrics, all taken at one moment.

    Args:
        metrics: the server's counts.
        stats: the engine's, or None while there is no engine.
        model_name: a label of every metric.
        waiting: requests that wait in front of the engine.
    """

    def __init__(self, metrics: ServerMetrics, stats: Callable[[], EngineStats | None], model_name: str,
                 waiting: Callable[[], int]) -> None:
        self._metrics, self._stats, self._waiting = metrics, stats, waiting
        self._labels = {'model_name': model_name, 'engine': '0'}

    def render(self) -> bytes:
        """The text that a scrape gets."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """The metrics, for a registry of prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        m, names, values = self._metrics, list(self._labels), list(self._labels.values())

        def gauge(name: str, help: str, value: float) -> Metric:
            family = GaugeMetricFamily(f'lmdeploy:{name}', help, labels=names)
            family.add_metric(values, value)
            return family

        def counter(name: str, help: str, counts: dict[str, float], label: str | None = None) -> Metric:
            family = CounterMetricFamily(f'lmdeploy:{name}', help, labels=[*names, *([label] if label else [])])
            for key, value in counts.items():
                family.add_metric([*values, *([key] if label else [])], value)
            return family

        yield counter('requests_accepted', 'requests that the server took on', {'': m.accepted})
        yield counter('requests_finished', 'of these, those answered to the end', {'': m.finished})
        yield counter('requests_failed', 'of these, those that ended with an error', {'': m.failed})
        yield counter('requests_cancelled', 'of these, those whose client left or that were aborted',
                      {'': m.cancelled})
        yield gauge('requests_in_flight', 'of these, those that run now', m.in_flight)
        yield counter('requests_rejected', 'requests that were turned away', dict(m.rejected), 'code')
        yield counter('http_responses', 'responses by status', {str(k): v for k, v in m.responses.items()}, 'status')
        yield counter('unknown_fields', 'fields of requests that are unknown and were left out',
                      {'': m.unknown_fields})
        yield gauge('event_loop_lag_seconds', 'by which the event loop was late, when it was last measured', m.lag.last)
        yield gauge('event_loop_lag_worst_seconds', 'the largest of these in the last 30 to 60 seconds', m.lag.worst)
        yield counter('audit_dropped', 'lines of the audit log that could not be written', {'': m.audit_dropped})
        yield gauge('num_requests_succeeded', 'requests that were answered to the end', m.finished)
        yield gauge('num_requests_failed', 'requests that ended with an error', m.failed)
        yield gauge('num_api_requests_routed', 'requests that were handed to the engine', m.in_flight)
        yield gauge('num_api_requests_waiting', 'requests that wait in front of the engine', self._waiting())
        yield counter('prompt_tokens', 'tokens of prompts', {'': m.prompt_tokens})
        yield counter('generation_tokens', 'generated tokens', {'': m.generation_tokens})
        yield counter('cached_tokens', 'tokens of prompts that the prefix cache answered', {'': m.cached_tokens})
        yield counter('request_success', 'answers by how they ended', dict(m.finish_reasons), 'finished_reason')
        stats = self._stats()
        if stats is not None:
            yield gauge('num_requests_running', 'requests in the running batch', stats.running)
            yield gauge('num_requests_waiting', 'requests that wait in the engine', stats.waiting)
            yield gauge('gpu_cache_usage_perc', 'share of the KV cache in use, from 0 to 1',
                        stats.used_blocks / max(stats.total_blocks, 1))
            yield gauge('prefix_cache_hit_rate', 'share of looked-up prompt tokens that the prefix cache answered',
                        stats.prefix_hit_tokens / max(stats.prefix_query_tokens, 1))
            yield counter('preemptions', 'requests that were set back to make room', {'': stats.preemptions})
            yield counter('engine_steps', 'steps of the engine', {'': stats.steps})
            yield counter('iteration_tokens', 'query tokens of all steps', {'': stats.computed_tokens})
            yield counter('non_finite', 'requests whose logits were not finite', {'': stats.non_finite})
        for name, histogram in m.histograms.items():
            family = HistogramMetricFamily(f'lmdeploy:{name}', HISTOGRAMS[name][0], labels=names)
            family.add_metric(values, histogram.cumulative(), histogram.total)
            yield family

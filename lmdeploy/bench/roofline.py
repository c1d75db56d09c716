"""The least time that a device needs for a workload, from its memory's speed and its peak of multiplications.

Nothing here is measured of an engine: a step's time is the larger of the time to move its bytes and the time to do its
multiplications, part by part (the roofline model: Williams, Waterman, Patterson 2009). Launches, norms, sampling and
the host take no time, and prompts and generation do not overlap. With W parameters of the layers' matrices, H of the
output head, b bytes each, and k bytes of keys and values per token:

* a decode step of B rows over C tokens of context in all: ``max(W b / copy, 2 W B / peak) + max(H b / copy, 2 H B /
  peak) + k C / copy``;
* a prompt of S tokens: ``2 W S / peak`` and causal attention, but at least the time to read the weights once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmdeploy.config.model import SLIDING, ModelConfig


@dataclass(frozen=True, slots=True)
class Roof:
    """What a device can do.

    Attributes:
        copy: bytes per second, of reading and writing together.
        peak: floating-point operations per second of matrix products; ``attention``: of attention, 0: the same.
        source: where the numbers come from.
    """

    copy: float
    peak: float
    attention: float = 0.0
    source: str = 'given'


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one token costs.

    Attributes:
        linear, head: parameters of the layers' matrices, and of the output head.
        weight_bytes: bytes of one parameter as it is read; ``head_bytes``: of the head.
        kv_bytes: of the keys and values of one token in one layer.
        query: query heads times their channels.
        windows: tokens that a layer sees, one per layer; 0: all.
    """

    linear: int
    head: int
    weight_bytes: float
    head_bytes: float
    kv_bytes: float
    query: int
    windows: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig, weight_bytes: float = 2.0, kv_bytes: float = 2.0,
           head_bytes: float | None = None) -> ModelCost:
        """Of a model whose weights and cached values take so many bytes each."""
        hidden, query, kv = (config.hidden_size, config.num_heads * config.head_dim,
                             config.num_kv_heads * config.head_dim)
        layer = hidden * (query + 2 * kv) + query * hidden + 3 * hidden * config.intermediate_size
        return cls(
            linear=config.num_layers * layer, head=hidden * config.vocab_size, weight_bytes=weight_bytes,
            head_bytes=weight_bytes if head_bytes is None else head_bytes, kv_bytes=2 * kv * kv_bytes, query=query,
            windows=tuple(config.sliding_window if kind == SLIDING else 0 for kind in config.layer_types))

    def seen(self, context: float) -> float:
        """Tokens that a query at the end of ``context`` tokens sees, all layers together."""
        return sum(min(context, window) if window else context for window in self.windows)

    def seen_between(self, first: int, last: int) -> float:
        """The sum of :meth:`seen` over contexts of ``first`` to ``last`` tokens."""
        return sum(_sum_capped(first, last, window) * self.windows.count(window) for window in set(self.windows))


def _sum_capped(first: int, last: int, cap: int) -> float:
    """``sum(min(n, cap) for n in range(first, last + 1))``; a cap of 0 is none."""
    if last < first:
        return 0.0
    whole = (first + last) * (last - first + 1) / 2
    if not cap or last <= cap:
        return whole
    start = max(first, cap + 1)
    return whole - ((start + last) * (last - start + 1) / 2 - cap * (last - start + 1))


def decode_seconds(cost: ModelCost, roof: Roof, rows: float, context: float) -> float:
    """One step that makes a token for each of ``rows`` requests with ``context`` tokens each."""
    return _weights_seconds(cost, roof, rows) + rows * cost.seen(context) * cost.kv_bytes / roof.copy


def _weights_seconds(cost: ModelCost, roof: Roof, rows: float) -> float:
    return sum(max(size * width / roof.copy, 2 * size * rows / roof.peak)
               for size, width in ((cost.linear, cost.weight_bytes), (cost.head, cost.head_bytes)))


def prompt_seconds(cost: ModelCost, roof: Roof, tokens: int) -> float:
    """The multiplications of a prompt: its first token can come no earlier, alone on the device."""
    attention = 4 * cost.query * cost.seen_between(1, tokens) / (roof.attention or roof.peak)
    return 2 * cost.linear * tokens / roof.peak + attention


def first_token_seconds(cost: ModelCost, roof: Roof, tokens: int) -> float:
    """The time to the first token of a prompt that has the device to itself."""
    weights = (cost.linear * cost.weight_bytes + cost.head * cost.head_bytes) / roof.copy
    return max(prompt_seconds(cost, roof, tokens), weights)


def run_seconds(cost: ModelCost, roof: Roof, inputs: Sequence[int], outputs: Sequence[int], rows: int) -> float:
    """All requests, at most ``rows`` at a time: every prompt, then every token after a request's first.

    Steps are as few as the longest answer and ``rows`` allow, and equally full: no schedule can stream the weights less
    often.
    """
    tokens = sum(outputs) - len(outputs)
    prompts = sum(prompt_seconds(cost, roof, length) for length in inputs)
    weights = (cost.linear * cost.weight_bytes + cost.head * cost.head_bytes) / roof.copy
    prompts = max(prompts, weights)
    if not tokens:
        return prompts
    steps = max(-(-tokens // rows), max(outputs) - 1)
    cached = sum(cost.seen_between(given + 1, given + made - 1) for given, made in zip(inputs, outputs))
    return prompts + steps * _weights_seconds(cost, roof, tokens / steps) + cached * cost.kv_bytes / roof.copy

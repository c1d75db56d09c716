"""``bench throughput`` and ``bench latency``: the engine alone, token ids in and out, beside its roofline.

Life: :class:`Bench` starts an engine of its own; :meth:`Bench.throughput` and :meth:`Bench.latency` warm it up and run
their workload some times over; the round in the middle is the result.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from lmdeploy.bench.breakdown import Breakdown, breakdown
from lmdeploy.bench.device import DeviceFacts, measure_roof
from lmdeploy.bench.measure import Measured, run
from lmdeploy.bench.report import Environment, Spread
from lmdeploy.bench.roofline import ModelCost, Roof, decode_seconds, first_token_seconds, run_seconds
from lmdeploy.bench.workload import Workload
from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.errors import ConfigError
from lmdeploy.executor.choice import make_executor
from lmdeploy.models.stored import bytes_per_weight
from lmdeploy.runner.model_runner import choose_device

WARM_REQUESTS, WARM_TOKENS = 8, 8


@dataclass(frozen=True, slots=True)
class Round:
    """One run of a workload; times in milliseconds, rates per second of the whole run.

    Attributes:
        output_tokens_per_second: generated tokens by the time from the first arrival to the last token.
        first_token: from a request's arrival; ``per_token``: a request's mean time between its tokens.
        between_tokens: all times between a request's tokens, where they were noted.
        host_ms_per_step: of a step's time, what is not spent waiting for the device.
    """

    seconds: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    requests_per_second: float
    first_token: Spread | None
    per_token: Spread | None
    between_tokens: Spread | None
    steps: int
    preemptions: int
    host_ms_per_step: float

    @classmethod
    def of(cls, measured: Measured) -> Round:
        return cls(
            seconds=measured.seconds, output_tokens_per_second=measured.tokens_per_second,
            total_tokens_per_second=(measured.prompt_tokens + measured.output_tokens) / measured.seconds,
            requests_per_second=measured.requests_per_second, first_token=Spread.of(measured.first),
            per_token=Spread.of(measured.per_token), between_tokens=Spread.of(measured.gaps), steps=measured.steps,
            preemptions=measured.preemptions, host_ms_per_step=measured.host_ms)


@dataclass(frozen=True, slots=True)
class Bound:
    """The computed roofline of a workload and the share of it that was reached, 1 at most.

    Attributes:
        seconds: the least time of the whole run. first_token_ms, per_token_ms: those of one request alone.
        ratio: ``seconds`` by the time that was measured; first_token_ratio, per_token_ratio: likewise.
    """

    seconds: float
    ratio: float
    first_token_ms: float | None = None
    first_token_ratio: float | None = None
    per_token_ms: float | None = None
    per_token_ratio: float | None = None


@dataclass(slots=True)
class OfflineReport:
    """All that is known of one benchmark of the engine."""

    benchmark: str
    environment: Environment
    device: DeviceFacts
    model: str
    architecture: str
    dtype: str
    engine: EngineConfig
    runs: dict[str, str]  # what the engine chose: runner, attention, ...
    start_seconds: float
    requests: int
    prompt_tokens: int
    output_tokens: int
    workload: str
    concurrency: int  # requests at a time
    seed: int
    roof: Roof
    cost: ModelCost
    bound: Bound
    rounds: list[Round]
    median: Round
    breakdown: Breakdown | None = None


class Bench:
    """An engine that is there to be measured.

    Args:
        config: of the engine; without a session length it gets that of the workload.
        path: model folder, ``.gguf`` file, or a config.json alone with ``load_format='dummy'``.
        model: its name in the report.
        longest: tokens of the longest request with its answer.

    Raises:
        ConfigError: LMD-591, the model does not take requests of that length.
    """

    def __init__(self, config: EngineConfig, path: Path, model: str, longest: int) -> None:
        if config.session_len is None:
            config = replace(config, session_len=longest)
        if config.session_len is not None and longest > config.session_len:
            raise ConfigError('LMD-591', longest=longest, most=config.session_len)
        begin = time.perf_counter()
        self.config, self.model = config, model
        self.executor = make_executor(config, path)
        self.capacity = self.executor.start()
        self.core = EngineCore(self.executor, self.capacity, depth=config.depth_on(self.capacity.device),
                               prefix_caching=config.prefix_caching)
        self.start_seconds = time.perf_counter() - begin
        self.device = choose_device(config.device)

    def close(self) -> None:
        self.executor.stop()

    def throughput(self, load: Workload, *, rounds: int, seed: int, concurrency: int | None = None,
                   roof: Roof | None = None, inside: bool = False) -> OfflineReport:
        """All requests at once, or ``concurrency`` at a time; ``inside``: with a breakdown of a step."""
        at_once = min(concurrency or len(load), len(load), self.capacity.max_batch_size)
        found = self._rounds(load, rounds, seed, concurrency, gaps=False)
        cost, roof = self._cost(), roof or measure_roof(self.device, self.executor.dtype)
        bound = run_seconds(cost, roof, load.inputs, load.outputs, at_once)
        median = found[len(found) // 2]
        report = self._report('throughput', load, seed, at_once, found, cost, roof,
                              Bound(bound, bound / median.seconds))
        if inside:
            timed, profiled = (load.requests(self.capacity.vocab_size, seed=seed + rounds + i, tag=f'inside{i}-')
                               for i in (1, 2))
            report.breakdown = breakdown(self.core, timed, profiled, concurrency=concurrency)
        return report

    def latency(self, load: Workload, *, rounds: int, seed: int, roof: Roof | None = None) -> OfflineReport:
        """One request after another, each alone in the engine."""
        found = self._rounds(load, rounds, seed, 1, gaps=True)
        cost, roof = self._cost(), roof or measure_roof(self.device, self.executor.dtype)
        median = found[len(found) // 2]
        whole = run_seconds(cost, roof, load.inputs, load.outputs, 1)
        first = statistics.mean(first_token_seconds(cost, roof, length) for length in load.inputs)
        token = statistics.mean(decode_seconds(cost, roof, 1, given + (made + 1) / 2)
                                for given, made in zip(load.inputs, load.outputs))
        assert median.first_token is not None
        bound = Bound(whole, whole / median.seconds, 1000 * first, 1000 * first / median.first_token.mean)
        if median.per_token is not None:
            bound = replace(bound, per_token_ms=1000 * token, per_token_ratio=1000 * token / median.per_token.mean)
        return self._report('latency', load, seed, 1, found, cost, roof, bound)

    def _rounds(self, load: Workload, rounds: int, seed: int, concurrency: int | None, gaps: bool) -> list[Round]:
        """The runs, the fastest first, after a short one that compiles and touches what they need."""
        vocab_size = self.capacity.vocab_size
        warm = Workload('warm', load.inputs[:WARM_REQUESTS],
                        tuple(min(WARM_TOKENS, made) for made in load.outputs[:WARM_REQUESTS]))
        run(self.core, warm.requests(vocab_size, seed=seed + rounds, tag='warm'), concurrency=concurrency)
        found = []
        for i in range(rounds):
            requests = load.requests(vocab_size, seed=seed + i, tag=f'{i}-')
            found.append(Round.of(run(self.core, requests, concurrency=concurrency, gaps=gaps)))
        return sorted(found, key=lambda one: one.seconds)

    def _cost(self) -> ModelCost:
        config, capacity = self.executor.model_config, self.capacity
        numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim  # of a token
        cached = capacity.kv_bytes / ((capacity.num_blocks + 1) * capacity.block_size * numbers)
        itemsize = self.executor.dtype.itemsize
        return ModelCost.of(config, weight_bytes=bytes_per_weight(config, self.executor.dtype), kv_bytes=cached,
                            head_bytes=1 if self.config.head else itemsize)

    def _report(self, name: str, load: Workload, seed: int, concurrency: int, found: list[Round], cost: ModelCost,
                roof: Roof, bound: Bound) -> OfflineReport:  # fmt: skip
        return OfflineReport(
            benchmark=name, environment=Environment(), device=DeviceFacts.of(self.device), model=self.model,
            architecture=self.executor.model_config.architecture,
            dtype=str(self.executor.dtype).removeprefix('torch.'), engine=self.config,
            runs=dict(self.capacity.choices), start_seconds=self.start_seconds, requests=len(load),
            prompt_tokens=sum(load.inputs), output_tokens=sum(load.outputs), workload=load.name,
            concurrency=concurrency, seed=seed, roof=roof, cost=cost, bound=bound, rounds=found,
            median=found[len(found) // 2])

"""Speed of quantised weights on the CPU beside the same model's bfloat16, by ratio, in one process.

    python benchmark/cpu_quantised.py [shapes:qwen2.5-0.5b | MODEL.gguf] [--kinds w4a16,w8a8-int8] [--rounds 5]
                                      [--threads 2] [--clock cpu]

Every kind of weights gets an engine of its own, and all run in one thread, so that they share one team of OpenMP
threads. In a round each runs right after bfloat16; its figure is the median over the rounds of bfloat16's time over its
own, beside the least and the largest: the speed of shared machines swings from minute to minute. ``--clock cpu`` counts
the processor's time instead of the wall clock's (for ``--threads 1``), which leaves out what other programs take away.

Reported: decode of one stream and of 8, and the prefill of a prompt. Weights of ``shapes:`` are random: speed does not
depend on them. A GGUF file is compared as it is kept and as ``exact_weights``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lmdeploy.bench import shapes
from lmdeploy.bench.measure import run
from lmdeploy.bench.offline import Bench
from lmdeploy.bench.workload import fixed
from lmdeploy.config.engine import EngineConfig

STREAMS = 8
KINDS = 'w4a16,w8a16,w8a8-int8,w4a8'
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Figure:
    """How many times as fast as bfloat16, with the extremes over the rounds; milliseconds of a step or a prompt."""

    weights: str
    measured: str
    ratio: float
    least: float
    most: float
    ms: float
    bf16_ms: float
    start_seconds: float

    def __str__(self) -> str:
        return (f'{self.weights:22} {self.measured:18} {self.ratio:5.2f} x bf16 ({self.least:.2f} to {self.most:.2f})'
                f'   {self.ms:8.2f} ms beside {self.bf16_ms:8.2f}')


def engines(model: str, kinds: list[str], longest: int) -> Iterator[tuple[str, Bench]]:
    """bfloat16 first; engines start when they are asked for."""
    config = EngineConfig(device='cpu', dtype='bfloat16', max_batch_size=STREAMS,
                          num_blocks=STREAMS * (longest // 64 + 2))  # fmt: skip
    path = shapes.find(model)
    if path is None:
        yield 'bf16', Bench(replace(config, exact=True), Path(model), model, longest)
        yield 'as kept', Bench(config, Path(model), model, longest)
        return
    config = replace(config, load_format='dummy')
    yield 'bf16', Bench(config, path, model, longest)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            stored = shapes.quantised(path, kind, Path(folder))
            for head in ('', 'int8'):
                name = f'{kind}, {head or "bf16"} head'
                yield name, Bench(replace(config, head=head), stored, name, longest)


def seconds(bench: Bench, clock: Clock, streams: int, prompt: int, tokens: int, seed: int) -> float:
    """Of ``tokens`` steps of ``streams`` rows that have ``prompt`` tokens each; of the prompt where they are 1."""
    def spent(made: int) -> float:
        requests = fixed(streams, prompt, made).requests(bench.capacity.vocab_size, seed=seed, tag=f'{seed}.{made}-')
        begin = clock()
        run(bench.core, requests)
        return clock() - begin

    return spent(1) if tokens == 1 else spent(tokens + 1) - spent(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', nargs='?', default='shapes:qwen2.5-0.5b')
    parser.add_argument('--kinds', default=KINDS)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--clock', choices=('wall', 'cpu'), default='wall')
    parser.add_argument('--prompt', type=int, default=512)
    parser.add_argument('--tokens', type=int, default=16)
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock: Clock = time.perf_counter if args.clock == 'wall' else time.process_time
    works = {'decode, 1 stream': (1, 64, args.tokens), f'decode, {STREAMS} streams': (STREAMS, 32, args.tokens // 2),
             f'prefill of {args.prompt}': (1, args.prompt, 1)}  # fmt: skip
    figures: list[Figure] = []
    benches = engines(args.model, args.kinds.split(','), args.prompt + args.tokens + 2)
    base = next(benches)[1]
    for name, bench in benches:
        for what, (streams, prompt, tokens) in works.items():
            times: dict[int, list[float]] = {}
            for seed in range(args.rounds + 1):  # the first one warms up
                for one in (base, bench):
                    times.setdefault(id(one), []).append(seconds(one, clock, streams, prompt, tokens, seed))
            own, other = times[id(bench)][1:], times[id(base)][1:]
            ratios = [b / a for a, b in zip(own, other)]
            report = Figure(name, what, statistics.median(ratios), min(ratios), max(ratios),
                            1000 * statistics.median(own) / tokens, 1000 * statistics.median(other) / tokens,
                            bench.start_seconds)  # fmt: skip
            figures.append(report)
            print(report, flush=True)
        bench.close()
    if args.json:
        found = {'model': args.model, 'threads': args.threads, 'clock': args.clock, 'torch': torch.__version__,
                 'figures': [asdict(one) for one in figures]}  # fmt: skip
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == '__main__':
    main()

"""Requests with pictures through the engine, with random weights: rate, first token, encoder's share, pace of text.

    python benchmark/vision_requests.py [shapes:internvl3-1b | FOLDER] [--pictures 1,4] [--concurrency 1,16]

Every picture is another one, of 12 tiles and a thumbnail, so that nothing is found again. The encoder's time is that of
its kernels on a GPU, by events around them. For the pace of text, eight answers are written alone, then while requests
with pictures arrive one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lmdeploy.bench import shapes
from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.vision import read_preprocessor, read_vision
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.request import EngineInput, ImageSpan
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.vl.processor import Processed, Processor, build_processor
from lmdeploy.weights.dummy import read_config

QUESTION = 40  # text tokens before and behind the pictures
SIZE = (1792, 1344)  # pixels: 12 tiles and a thumbnail


@dataclass
class Clock:
    """Time on the device between pairs of events, or on a CPU between calls."""

    gpu: bool
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    seconds: float = 0.0

    def around(self, call):
        def timed(*args):
            if not self.gpu:
                begin = time.perf_counter()
                result = call(*args)
                self.seconds += time.perf_counter() - begin
                return result
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = call(*args)
            end.record()
            self.pairs.append((begin, end))
            return result
        return timed

    def take(self) -> float:
        """Seconds since the last call."""
        if self.gpu:
            torch.cuda.synchronize()
        found = self.seconds + sum(begin.elapsed_time(end) for begin, end in self.pairs) / 1000
        self.seconds, self.pairs = 0.0, []
        return found


def pictures(processor: Processor, count: int, seed: int) -> list[Processed]:
    noise = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        small = noise.integers(0, 256, (48, 64, 3), np.uint8)
        found.append(processor.process(Image.fromarray(small).resize(SIZE)))
    return found


def request(name: str, done: list[Processed], vocab: int, answer: int, seed: int) -> EngineInput:
    noise, tokens, spans = np.random.default_rng(seed), [], []
    for picture in done:
        tokens += noise.integers(10, vocab - 10, QUESTION).tolist()
        digest = sha256(picture.pixels.tobytes()).digest()
        end = len(tokens) + picture.layout.tokens
        spans.append(ImageSpan(len(tokens), end, digest, picture.layout, picture.pixels))
        tokens += [5] * picture.layout.tokens
    tokens += noise.integers(10, vocab - 10, QUESTION).tolist()
    return EngineInput(name, tokens, SamplingParams(max_new_tokens=answer), images=tuple(spans))


def closed_loop(core: EngineCore, requests: list[EngineInput], concurrency: int) -> tuple[float, list[float]]:
    """Seconds of all requests, ``concurrency`` of them at a time, and each one's time to its first token."""
    waiting, begun = list(requests), dict[str, float]()
    first: dict[str, float] = {}
    begin = time.perf_counter()
    while waiting or not core.idle:
        while waiting and len(begun) < concurrency:
            begun[waiting[0].id] = time.perf_counter()
            core.submit(waiting.pop(0))
        for delta in core.step():
            if delta.tokens:
                first.setdefault(delta.id, time.perf_counter() - begun[delta.id])
            if delta.finish is not None:
                assert delta.finish.error is None, delta.finish
                del begun[delta.id]
    return time.perf_counter() - begin, list(first.values())


def pace(core: EngineCore, texts: list[EngineInput], beside: list[EngineInput]) -> list[float]:
    """Seconds between tokens of ``texts`` while the requests ``beside`` come one after the other."""
    last: dict[str, float] = {}
    gaps: list[float] = []
    names = {text.id for text in texts}
    for text in texts:
        core.submit(text)
    pending, active = list(beside), ''
    while not core.idle:
        if not active and pending and len(last) == len(texts):
            active = pending[0].id
            core.submit(pending.pop(0))
        for delta in core.step():
            now = time.perf_counter()
            if delta.id in names and delta.tokens:
                if delta.id in last and (active or not beside):
                    gaps.append(now - last[delta.id])
                last[delta.id] = now
            if delta.finish is not None and delta.id == active:
                active = ''
        if beside and not pending and not active:
            while names:
                core.abort(names.pop())
    return gaps


def percentile(gaps: list[float]) -> float:
    return sorted(gaps)[int(len(gaps) * 0.99)]


def shown(gaps: list[float]) -> str:
    return (f'median {statistics.median(gaps) * 1e3:.2f} ms, 99th {percentile(gaps) * 1e3:.2f}, '
            f'most {max(gaps) * 1e3:.2f}, {len(gaps)} gaps')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', nargs='?', default='shapes:internvl3-1b')
    parser.add_argument('--pictures', default='1,4')
    parser.add_argument('--concurrency', default='1,16')
    parser.add_argument('--rounds', type=int, default=1, help='requests: so many times the concurrency')
    parser.add_argument('--answer', type=int, default=64)
    parser.add_argument('--pace-tokens', type=int, default=320,
                        help='the pace of text also with so many tokens a step at most, as max_prefill_token_num')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='bfloat16')
    args = parser.parse_args()
    path = shapes.find(args.model) or Path(args.model)
    values = read_config(path)
    processor = build_processor(read_vision(values, read_preprocessor(path)))
    counts, widths = ([int(n) for n in given.split(',')] for given in (args.pictures, args.concurrency))
    config = EngineConfig(load_format='dummy', device=args.device, dtype=args.dtype, session_len=20000,
                          runner='graph' if args.device == 'cuda' else 'eager', max_batch_size=64)  # fmt: skip
    begin = time.perf_counter()
    executor = LocalExecutor(config, path)
    capacity = executor.start()
    core = EngineCore(executor, capacity, depth=2, prefix_caching=True)
    print(f'{args.model}: started in {time.perf_counter() - begin:.1f} s; {capacity.pictures}', flush=True)
    clock = Clock(args.device == 'cuda')
    runner = executor._runner
    runner.pictures.run = clock.around(runner.pictures.run)
    seed = 1
    begin = time.perf_counter()
    pool = pictures(processor, 8, 0)
    taken = (time.perf_counter() - begin) / len(pool)
    print(f'preparing a picture takes {taken * 1e3:.0f} ms of one core, {pool[0].layout}', flush=True)
    vocab = capacity.vocab_size

    def fresh(picture: Processed) -> Processed:  # another one, quickly
        nonlocal seed
        seed += 1
        pixels = picture.pixels.copy()
        pixels[:, :, 0, :8] = np.frombuffer(seed.to_bytes(8, 'little'), np.uint8)
        return Processed(pixels, picture.layout)

    closed_loop(core, [request(f'warm{i}', [fresh(pool[0])], vocab, 4, i) for i in range(2)], 2)
    clock.take()
    for tokens in (capacity.max_step_tokens, args.pace_tokens):
        fewer = EngineCore(executor, replace(capacity, max_step_tokens=tokens), depth=2)
        quiet = pace(fewer, [request(f'q{tokens}.{i}', [], vocab, 300, i) for i in range(8)], [])
        beside = [request(f'p{tokens}.{i}', [fresh(pool[i % len(pool)])], vocab, 8, i) for i in range(6)]
        gaps = pace(fewer, [request(f't{tokens}.{i}', [], vocab, 1500, i) for i in range(8)], beside)
        usual = statistics.median(quiet)
        print(f'steps of up to {tokens} tokens: text alone {shown(quiet)}; beside pictures {shown(gaps)}: '
              f'{statistics.median(gaps) / usual:.2f} times the median, the 99th {percentile(gaps) / usual:.2f} times',
              flush=True)  # fmt: skip
    clock.take()
    for count in counts:
        for width in widths:
            requests = [
                request(f'{count}.{width}.{i}', [fresh(pool[(i + j) % len(pool)]) for j in range(count)], vocab,
                        args.answer, i) for i in range(max(4, width * args.rounds))]  # fmt: skip
            seconds, first = closed_loop(core, requests, width)
            encoding = clock.take()
            print(f'{count} pictures, {width:2d} at a time: {len(requests) / seconds:6.2f} requests/s, first token '
                  f'{statistics.median(first) * 1e3:7.1f} ms (median), encoder {encoding / seconds:4.0%} of the time',
                  flush=True)  # fmt: skip
    executor.stop()


if __name__ == '__main__':
    main()

"""The offline engine on a GPU with random weights: its speed, and where the time of a step goes.

    python benchmark/gpu_decode.py --model llama3-8b --cases 1 16 256 sharegpt
    python benchmark/gpu_decode.py --model qwen2.5-0.5b --cases 1 --profile

Token ids in and out, greedy, no end tokens, no prefix cache.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections import Counter
from pathlib import Path

from lmdeploy.api import start_line
from lmdeploy.bench.measure import Measured, run
from lmdeploy.bench.workload import Workload, fixed, sharegpt_like
from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.log import set_level

SHAPES = Path(__file__).parent / 'shapes'
CASES = {
    'warm': fixed(8, 300, 8),
    '1': fixed(1, 128, 512),
    '16': fixed(16, 1000, 1000),
    '16s': fixed(16, 1000, 100),
    '256': fixed(256, 1000, 1000),
    '256s': fixed(256, 1000, 100),
    'sharegpt': sharegpt_like(1000),
    'sharegpt-s': sharegpt_like(300),
}


def build(args: argparse.Namespace) -> tuple[LocalExecutor, EngineCore]:
    """The engine, started."""
    config = EngineConfig(dtype=args.dtype, device=args.device, runner=args.runner, load_format='dummy',
                          session_len=2048, max_batch_size=args.batch, depth=args.depth)  # fmt: skip
    path = SHAPES / f'{args.model}.json'
    begin = time.perf_counter()
    executor = LocalExecutor(config, path if path.exists() else Path(args.model))
    capacity = executor.start()
    if args.no_mixed:
        executor._runner.mixed = None
    print(start_line(capacity))
    print(f'started in {time.perf_counter() - begin:.1f} s', flush=True)
    return executor, EngineCore(executor, capacity, depth=config.depth_on(capacity.device))


def report(load: Workload, measured: Measured, graphs: list[tuple[int, float]]) -> None:
    """One line of results, one of the breakdown."""
    per_token = 1000 * statistics.median(measured.per_token)
    print(f'{load.name:24} {measured.tokens_per_second:9.1f} tok/s {measured.requests_per_second:7.2f} req/s '
          f'{per_token:7.3f} ms/token, TTFT median {1000 * statistics.median(measured.first):.1f} ms, '
          f'{measured.seconds:.2f} s, {measured.steps} steps, preempted {measured.preemptions}')
    line = f'    per step: {1000 * measured.seconds / measured.steps:.3f} ms, of it host {measured.host_ms:.3f} ms'
    if graphs:
        times = [ms for _, ms in graphs]
        line += f'; {len(graphs)} graphs, median {statistics.median(times):.3f} ms, sum {sum(times) / 1000:.2f} s'
        busiest = statistics.multimode(bucket for bucket, _ in graphs)[0]
        inside = [ms for bucket, ms in graphs if bucket == busiest]
        line += f'; bucket {busiest}: {statistics.median(inside):.3f} ms x {len(inside)}'
    print(line, flush=True)


def kernels(core: EngineCore, load: Workload, vocab_size: int) -> None:
    """Time by kernel over a few decode steps, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    for request in load.requests(vocab_size, tag='kernels'):
        core.submit(request)
    for _ in range(40 + len(load) * load.inputs[0] // 8192):
        core.step()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(5):
            core.step()
    found = sorted(record.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in found)
    print(f'    {total / 5000:.3f} ms of kernels per step:')
    for event in found[:18]:
        print(f'    {event.self_device_time_total / 5:9.1f} us {event.count / 5:6.1f} x  {event.key[:90]}')
    for name in list(core.scheduler.requests):
        core.abort(name)
    while not core.idle:
        core.step()


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='llama3-8b', help='a name in benchmark/shapes, or a config.json')
    parser.add_argument('--cases', nargs='+', choices=list(CASES), default=['1', '16', '256', 'sharegpt'])
    parser.add_argument('--runner', choices=('graph', 'eager'), default='graph')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--dtype', default='bfloat16')
    parser.add_argument('--batch', type=int, default=512)
    parser.add_argument('--depth', type=int)
    parser.add_argument('--profile', action='store_true', help='the host side of the last case, by function')
    parser.add_argument('--kernels', action='store_true', help='the device side of each case, by kernel')
    parser.add_argument('--no-mixed', action='store_true', help='chunks of prompts without graphs')
    args = parser.parse_args()
    set_level('INFO')
    executor, core = build(args)
    compiled: list[str] = []
    if core.scheduler.capacity.device != 'cpu':
        from triton import knobs

        knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name)
    vocab_size = core.scheduler.capacity.vocab_size
    begin = time.perf_counter()
    run(core, CASES['warm'].requests(vocab_size, tag='warm'))
    print(f'warm in {time.perf_counter() - begin:.1f} s', flush=True)
    for turn, name in enumerate(args.cases):
        load = CASES[name]
        executor.call('time_graphs', True)
        measured = run(core, load.requests(vocab_size, tag=f'{turn}.{name}.'))
        report(load, measured, executor.call('time_graphs', False)[0])
        if compiled:
            print(f'    compiled meanwhile: {Counter(compiled)}', flush=True)
            compiled.clear()
        if args.kernels:
            kernels(core, load, vocab_size)
    if args.profile:
        profiler = cProfile.Profile()
        requests = CASES[args.cases[-1]].requests(vocab_size, tag='profile')
        profiler.runcall(run, core, requests)
        pstats.Stats(profiler).sort_stats('tottime').print_stats(25)
    executor.stop()


if __name__ == '__main__':
    main()

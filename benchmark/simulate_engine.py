"""Simulate the engine's bookkeeping for as long as you like, on all cores, and print what happened.

    python benchmark/simulate_engine.py --turns 1000000 --seed 0

Every simulated turn is checked: answers against a plain loop, blocks, slots, counters, order of admission, starvation.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor

from lmdeploy.engine.simulate import Report, simulate

TURNS = 250  # with customers; some more until the last one is served
SEEDS = 20  # per job


def job(first: int) -> Report:
    """Simulations of ``SEEDS`` seeds from ``first`` on."""
    return simulate(range(first, first + SEEDS), TURNS)


def main() -> None:
    """Run until so many turns are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--turns', type=int, default=100_000)
    parser.add_argument('--seed', type=int, default=0, help='the first seed')
    parser.add_argument('--processes', type=int, default=None)
    args = parser.parse_args()
    total, begin = Report(), time.monotonic()
    jobs = -(-args.turns // (TURNS * SEEDS))
    with ProcessPoolExecutor(args.processes) as pool:
        for report in pool.map(job, range(args.seed, args.seed + jobs * SEEDS, SEEDS)):
            total.add(report)
    seconds = time.monotonic() - begin
    print(f'{total.turns:,} turns in {seconds:.1f} s: {dict(total.finishes)}, {total.preemptions:,} preemptions, '
          f'{total.computed_tokens:,} tokens computed, {total.hit_tokens:,} found in the prefix cache; nothing wrong')


if __name__ == '__main__':
    main()

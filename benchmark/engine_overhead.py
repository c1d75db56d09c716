"""What the engine's bookkeeping costs per step: planning and retiring, without any device.

    python benchmark/engine_overhead.py --rows 256
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from lmdeploy.engine.plan import StepPlan, StepResult
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.engine.scheduler import Scheduler
from lmdeploy.executor.base import Capacity


def answer(plan: StepPlan) -> StepResult:
    """A token for each row that draws one."""
    starts = np.zeros(plan.rows + 1, np.int32)
    np.cumsum(plan.sample, out=starts[1:])
    return StepResult(plan.step, np.zeros(plan.rows, np.uint8), starts, np.full(starts[-1], 7, np.int32))


def measure(rows: int, steps: int, *, depth: int, prefix_caching: bool) -> tuple[float, float]:
    """Median milliseconds of plan and of retire while ``rows`` requests decode."""
    capacity = Capacity(num_blocks=rows * 64, block_size=64, max_batch_size=rows, max_step_tokens=8192,
                        session_len=8192, vocab_size=32000)
    scheduler = Scheduler(capacity, prefix_caching=prefix_caching)
    for i in range(rows):
        params = SamplingParams(max_new_tokens=4000, stop_ids=(2,))
        scheduler.add(EngineInput(str(i), [i % 1000 + 10] * 20, params))
    launched: list[StepPlan] = []
    plans, retires = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        launched.append(scheduler.plan())
        plans.append(time.perf_counter() - begin)
        if len(launched) == depth:
            plan = launched.pop(0)
            result = answer(plan)
            begin = time.perf_counter()
            scheduler.retire(plan, result)
            retires.append(time.perf_counter() - begin)
    return 1000 * statistics.median(plans[10:]), 1000 * statistics.median(retires[10:])


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=256)
    parser.add_argument('--steps', type=int, default=1000)
    args = parser.parse_args()
    for depth in (1, 2):
        for prefix_caching in (False, True):
            plan, retire = measure(args.rows, args.steps, depth=depth, prefix_caching=prefix_caching)
            print(f'{args.rows} rows, depth {depth}, prefix cache {"on" if prefix_caching else "off":>3}: '
                  f'plan {plan:.3f} ms + retire {retire:.3f} ms = {plan + retire:.3f} ms')


if __name__ == '__main__':
    main()

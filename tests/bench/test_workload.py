"""Workloads have the lengths they say; a measured run counts every token once."""

from __future__ import annotations

import numpy as np
import pytest

from lmdeploy.bench.measure import run
from lmdeploy.bench.suite import workloads
from lmdeploy.bench.workload import arrivals, fixed, sharegpt_like
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.fake import FakeExecutor
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.base import Capacity


def test_sharegpt_like_lengths_have_the_moments_of_conversations():
    load = sharegpt_like(20_000)
    inputs, outputs = np.array(load.inputs), np.array(load.outputs)
    assert inputs.min() >= 4 and inputs.max() <= 1024 and outputs.min() >= 4 and (inputs + outputs).max() <= 2048
    for lengths, mean, *percentiles in ((inputs, 214, 97, 599), (outputs, 198, 149, 442)):
        assert abs(lengths.mean() / mean - 1) < 0.04
        for percent, wanted in zip((50, 90), percentiles):
            assert abs(np.percentile(lengths, percent) / wanted - 1) < 0.08
    assert sharegpt_like(50) == sharegpt_like(50) and sharegpt_like(50, seed=1) != sharegpt_like(50)


def test_arrivals_are_a_poisson_process():
    times = np.array(arrivals(20_000, 50.0, seed=3))
    waits = np.diff(times, prepend=0.0)
    assert (waits > 0).all() and abs(waits.mean() * 50 - 1) < 0.03 and abs(waits.std() * 50 - 1) < 0.03
    assert abs((waits > 1 / 50).mean() - np.exp(-1)) < 0.01
    assert arrivals(5, 1.0) == arrivals(5, 1.0) != arrivals(5, 1.0, seed=1)
    assert arrivals(3, float('inf')) == [0.0, 0.0, 0.0]


def test_tokens_depend_on_the_seed_and_stay_in_the_vocabulary():
    first, again, other = (fixed(3, 50, 4).requests(10, seed=seed) for seed in (0, 0, 1))
    assert [r.tokens for r in first] == [r.tokens for r in again] != [r.tokens for r in other]
    assert {token for request in first for token in request.tokens} == set(range(10))
    assert all(request.params == SamplingParams(max_new_tokens=4) for request in first)  # greedy, and to the end
    assert SamplingParams().greedy and not SamplingParams().stop_ids


@pytest.mark.parametrize('depth', [1, 2])
def test_a_run_counts_every_token(depth):
    executor = FakeExecutor(Capacity(num_blocks=64, block_size=16, max_batch_size=8, max_step_tokens=64,
                                     session_len=128, vocab_size=100))
    capacity = executor.start()
    core = EngineCore(executor, capacity, depth=depth)
    load = fixed(5, 7, 9)
    measured = run(core, load.requests(capacity.vocab_size))
    assert (measured.requests, measured.prompt_tokens, measured.output_tokens) == (5, 35, 45)
    assert len(measured.first) == len(measured.per_token) == 5
    assert 0 < measured.waited < measured.seconds and measured.steps >= 9
    assert core.executor is executor


def test_so_many_at_a_time_and_each_is_timed_from_its_own_arrival():
    executor = FakeExecutor(Capacity(num_blocks=64, block_size=16, max_batch_size=8, max_step_tokens=64,
                                     session_len=128, vocab_size=100))
    core = EngineCore(executor, executor.start(), depth=1)
    seen = []
    launch = executor.launch
    executor.launch = lambda plan: (seen.append(plan.rows), launch(plan))[1]
    measured = run(core, fixed(6, 7, 9).requests(100), concurrency=2, gaps=True)
    assert max(seen) == 2 and measured.output_tokens == 54
    assert len(measured.gaps) == 6 * 8
    assert sum(measured.first) + sum(measured.gaps) <= 2 * measured.seconds  # the time of two places, and no more
    assert run(core, fixed(2, 7, 9).requests(100)).gaps == []


def test_the_suite_has_the_lengths_of_the_table():
    loads = workloads(['1', '16', '256', 'sharegpt'])
    assert [len(load) for load in loads.values()] == [1, 16, 256, 1000]
    assert loads['1'] == fixed(1, 128, 512) and set(loads['256'].inputs + loads['256'].outputs) == {1000}
    assert list(workloads(['256', '1'])) == ['256', '1']

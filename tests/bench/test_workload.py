"""Workloads have the lengths they say; a measured run counts every token once."""

from __future__ import annotations

import numpy as np
import pytest

from lmdeploy.bench.measure import run
from lmdeploy.bench.workload import fixed, sharegpt_like
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.fake import FakeExecutor
from lmdeploy.executor.base import Capacity


def test_sharegpt_like_lengths_have_the_moments_of_conversations():
    load = sharegpt_like(20_000)
    inputs, outputs = np.array(load.inputs), np.array(load.outputs)
    assert inputs.min() >= 4 and inputs.max() <= 1024 and outputs.min() >= 4 and (inputs + outputs).max() <= 2048
    assert abs(inputs.mean() - 214) < 10 and abs(np.median(inputs) - 97) < 10
    assert abs(outputs.mean() - 198) < 8 and abs(np.median(outputs) - 149) < 8
    assert sharegpt_like(50) == sharegpt_like(50) and sharegpt_like(50, seed=1) != sharegpt_like(50)


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

"""The memory plan against what a real model takes."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import sys
from pathlib import Path
from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.local import LocalExecutor

def resident():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS')) * 1024

before = resident()
executor = LocalExecutor(EngineConfig(device='cpu', num_blocks=64), Path(sys.argv[1]))
core = EngineCore(executor, executor.start())
for i in range(7):
    core.submit(EngineInput(str(i), [5 + i] * 500, SamplingParams(max_new_tokens=3)))
while not core.idle:
    core.step()
plan = executor._runner.plan
print(resident() - before, plan.weights + plan.workspace + plan.cache)
"""


@pytest.mark.real
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_running_model_takes_no_more_than_was_planned(smollm2):
    run = subprocess.run([sys.executable, '-c', MEASURE, str(smollm2)], capture_output=True, text=True, check=True)
    taken, planned = map(int, run.stdout.split())
    assert 0.5 * planned < taken < 1.05 * planned

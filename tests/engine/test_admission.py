"""Where slots are short, freed ones are given away several at a time, and soon."""

from __future__ import annotations

from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.fake import FakeExecutor
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.engine.scheduler import GATHER, PATIENCE
from lmdeploy.executor.base import Capacity


def drive(slots, lengths):
    """Serve requests of these output lengths; per step, how many were admitted, and how long a slot lay free."""
    capacity = Capacity(num_blocks=4000, block_size=4, max_batch_size=slots, max_step_tokens=2000, session_len=200,
                        vocab_size=100)
    core = EngineCore(FakeExecutor(capacity), capacity)
    for i, length in enumerate(lengths):
        core.submit(EngineInput(f'{i}', [1, 2, 3], SamplingParams(max_new_tokens=length)))
    admitted, idle, longest = [], 0, 0
    while not core.idle:
        before = len(core.scheduler.waiting)
        core.step()
        waiting, running = len(core.scheduler.waiting), len(core.scheduler.running)
        idle = idle + 1 if waiting and running < slots and waiting >= before else 0
        longest = max(longest, idle)
        admitted.append(max(0, before - waiting))
        core.check()
    return admitted[1:], longest


def test_freed_slots_are_gathered_but_not_for_long():
    slots = 4 * GATHER
    admitted, longest = drive(slots, [5 + i for i in range(slots)] + [3] * 60)
    assert max(admitted) > 1
    assert longest <= PATIENCE


def test_a_few_slots_are_given_away_at_once():
    admitted, longest = drive(GATHER - 1, [5 + i for i in range(GATHER - 1)] + [3] * 20)
    assert longest <= 1


def test_nobody_waits_while_there_are_slots_for_all():
    admitted, longest = drive(8 * GATHER, [4] * (8 * GATHER - 5))
    assert not any(admitted) and longest == 0

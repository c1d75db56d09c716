"""The scheduler of encoders: every text is read whole, once, and ends once, in whatever order things happen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.config.encoder import Pooling
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.plan import NO_MEMORY, StepPlan, StepResult
from lmdeploy.engine.request import EngineInput, TokenDelta
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import EngineDead
from lmdeploy.executor.base import Capacity

CAPACITY = Capacity(num_blocks=0, block_size=16, max_batch_size=3, max_step_tokens=20, session_len=12, vocab_size=50,
                    pooling=Pooling())
PARAMS = SamplingParams(max_new_tokens=0, output_hidden='all')


class Handle:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class Encoder:
    """An executor whose vector of a text is (its sum, its length)."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.dead = False

    def launch(self, plan: StepPlan) -> Handle:
        if self.dead:
            raise RuntimeError('the device is gone')
        self.plans.append(plan)
        texts = np.split(plan.tokens, plan.query_start[1:-1])
        result = StepResult(plan.step, np.zeros(plan.rows, np.uint8), np.zeros(plan.rows + 1, np.int32),
                            np.zeros(0, np.int32))
        result.hidden = {row: np.array([[text.sum(), len(text)]], np.float32) for row, text in enumerate(texts)}
        for row, text in enumerate(texts):
            if 13 in text:
                result.hidden[row][0, 0] = np.nan
            if 14 in text:
                result.status[row], result.errors[row] = NO_MEMORY, 'full'
        return Handle(result)


def make(depth: int = 1) -> tuple[EngineCore, Encoder]:
    encoder = Encoder()
    return EngineCore(encoder, CAPACITY, depth=depth), encoder  # type: ignore[arg-type]


def text(name: str, tokens: list[int], **fields) -> EngineInput:
    return EngineInput(name, tokens, PARAMS, **fields)


def drain(core: EngineCore) -> dict[str, TokenDelta]:
    found: dict[str, TokenDelta] = {}
    for _ in range(1000):
        if core.idle:
            return found
        for delta in core.step():
            assert delta.id not in found and delta.finish is not None, 'a text ends once, with its first delta'
            found[delta.id] = delta
        core.check()
    raise AssertionError('it does not come to rest')


TOKENS = st.lists(st.integers(0, 12) | st.integers(15, 49), min_size=1, max_size=12)
ACTIONS = st.lists(st.one_of(st.tuples(st.just('add'), TOKENS, st.sampled_from(['', 'a', 'b'])),
                             st.tuples(st.just('abort'), st.integers(0, 20)), st.tuples(st.just('step'))), max_size=40)


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.sampled_from([1, 2]))
def test_every_text_ends_once_with_its_own_vector(actions, depth):
    core, encoder = make(depth)
    sent: list[list[int]] = []
    ended: dict[str, TokenDelta] = {}
    for action in actions:
        if action[0] == 'add':
            core.submit(text(str(len(sent)), action[1], tenant=action[2]))
            sent.append(action[1])
        elif action[0] == 'abort':
            core.abort(str(action[1]))
        else:
            for delta in core.step():
                assert delta.id not in ended
                ended[delta.id] = delta
            core.check()
    rest = drain(core)
    assert not ended.keys() & rest.keys()
    ended |= rest
    assert set(ended) == {str(i) for i in range(len(sent))}
    for name, delta in ended.items():
        tokens = sent[int(name)]
        if delta.finish.reason == 'stop':
            assert delta.hidden.tolist() == [[sum(tokens), len(tokens)]] and delta.prompt_len == len(tokens)
        else:
            assert delta.finish.reason == 'abort' and delta.hidden is None
    for plan in encoder.plans:
        assert 1 <= plan.rows <= 3 and len(set(plan.slots.tolist())) == plan.rows
        assert plan.rows == 1 or plan.num_tokens <= 20
    stats = core.stats()
    assert stats.accepted == len(sent) and stats.in_flight == stats.used_blocks == 0


def test_texts_share_steps_first_come_first_served():
    core, encoder = make()
    for i, count in enumerate([8, 8, 8, 2, 2, 2]):
        core.submit(text(str(i), [i + 1] * count))
    drain(core)
    assert [plan.query_start.tolist() for plan in encoder.plans] == [[0, 8, 16], [0, 8, 10, 12], [0, 2]]


def test_what_cannot_run_is_refused_and_harms_nobody():
    core, _ = make()
    core.submit(text('long', [1] * 13))
    core.submit(text('empty', []))
    core.submit(text('foreign', [50]))
    core.submit(replace(text('chatty', [1]), params=SamplingParams(max_new_tokens=1)))
    core.submit(text('good', [1] * 12))
    core.submit(text('good', [2]))
    ended: dict[str, list[TokenDelta]] = {}
    while not core.idle:
        for delta in core.step():
            ended.setdefault(delta.id, []).append(delta)
    codes = {name: [d.finish.error.code if d.finish.error else '' for d in deltas] for name, deltas in ended.items()}
    assert codes == {'long': ['LMD-309'], 'empty': ['LMD-309'], 'foreign': ['LMD-331'], 'chatty': ['LMD-308'],
                     'good': ['LMD-333', '']}
    assert (core.stats().rejected, core.stats().finished) == (5, 1)


@pytest.mark.parametrize('token, code', [(13, 'LMD-334'), (14, 'LMD-207')])
def test_a_bad_row_is_that_texts_failure(token, code):
    core, _ = make()
    core.submit(text('bad', [token]))
    core.submit(text('good', [1, 2]))
    ended = drain(core)
    assert ended['bad'].finish.error.code == code and ended['bad'].hidden is None
    assert ended['good'].hidden.tolist() == [[3, 2]]
    assert core.stats().non_finite == (code == 'LMD-334')


def test_a_dead_device_ends_all():
    core, encoder = make(2)
    for i in range(5):
        core.submit(text(str(i), [i + 1]))
    encoder.dead = True
    ended = drain(core)
    assert len(ended) == 5 and all(isinstance(delta.finish.error, EngineDead) for delta in ended.values())
    core.submit(text('late', [1]))
    assert drain(core)['late'].finish.error.code == 'LMD-338'

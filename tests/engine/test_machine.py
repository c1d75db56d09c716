"""The engine as a hypothesis state machine: any order of arrivals, aborts and turns, shrunk when it fails."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lmdeploy.engine.fake import GuessingDrafter
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.engine.simulate import STOPS, VOCAB, CheckedEngine, EveryOther
from lmdeploy.executor.base import Capacity

# few different tokens, so that prompts often begin alike
PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=20)
PARAMS = st.builds(
    SamplingParams, max_new_tokens=st.integers(0, 16), stop_ids=st.sampled_from([(), STOPS]),
    output_logits=st.sampled_from([None, None, 'all', 'generation']),
    logits_processors=st.sampled_from([(), (), (max,)]))


class EngineMachine(RuleBasedStateMachine):
    """All checks are those of :class:`CheckedEngine`."""

    @initialize(blocks=st.integers(5, 16), size=st.sampled_from([2, 4]), slots=st.integers(1, 5),
                budget=st.integers(2, 24), depth=st.integers(1, 2), prefix=st.booleans(), delayed=st.booleans(),
                accuracy=st.sampled_from([None, 0.3, 1.0]))
    def start(self, blocks, size, slots, budget, depth, prefix, delayed, accuracy):
        capacity = Capacity(num_blocks=blocks, block_size=size, max_batch_size=slots, max_step_tokens=budget,
                            session_len=40, vocab_size=VOCAB)
        drafter = GuessingDrafter(VOCAB, accuracy=accuracy) if accuracy is not None else None
        self.longest = min(39, blocks * size)
        self.ids = 0
        self.engine = CheckedEngine(capacity, depth=depth, prefix_caching=prefix, delayed=delayed, drafter=drafter)

    @rule(prompt=PROMPTS, params=PARAMS, count=st.sampled_from([1, 1, 2, 3]), salt=st.sampled_from([b'', b's']),
          tenant=st.sampled_from(['', 't']), priority=st.integers(0, 1), grammar=st.booleans())
    def submit(self, prompt, params, count, salt, tenant, priority, grammar):
        self.ids += 1
        for i in range(count):
            self.engine.submit(EngineInput(
                f'{self.ids}.{i}', prompt[:self.longest], params, salt=salt, tenant=tenant, priority=priority,
                share=str(self.ids) if count > 1 else None, grammar=EveryOther() if grammar else None))

    @precondition(lambda self: self.engine.answers)
    @rule(data=st.data())
    def abort(self, data):
        self.engine.abort(data.draw(st.sampled_from(sorted(self.engine.answers))))

    @rule(count=st.integers(1, 6))
    def turns(self, count):
        for _ in range(count):
            self.engine.turn()

    def teardown(self):
        if hasattr(self, 'engine'):
            self.engine.drain()


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)

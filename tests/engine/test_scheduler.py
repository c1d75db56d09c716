"""Laws of the engine that have a name: one short story each."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.fake import FakeExecutor, continuation, next_token, score
from lmdeploy.engine.plan import OUTPUT_ALL, OUTPUT_LAST, OUTPUT_NONE, PENDING, PROCESSOR_FAILED, Logprobs
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import EngineDead, RequestError
from lmdeploy.executor.base import Capacity

VOCAB = 1000


class Recorder(FakeExecutor):
    """Keeps the plans."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.plans = []

    def launch(self, plan):
        self.plans.append(plan)
        return super().launch(plan)


def make(*, blocks=64, size=4, slots=8, budget=64, session_len=200, executor=Recorder, depth=1, prefix=False,
         **options):
    capacity = Capacity(num_blocks=blocks, block_size=size, max_batch_size=slots, max_step_tokens=budget,
                        session_len=session_len, vocab_size=VOCAB)
    return EngineCore(executor(capacity, **options), capacity, depth=depth, prefix_caching=prefix, debug=True)


def ask(name, prompt, **params):
    return EngineInput(name, prompt, SamplingParams(**params))


def serve(core, *requests, turns=100_000):
    """All deltas by request, after every request has ended."""
    for request in requests:
        core.submit(request)
    deltas = {request.id: [] for request in requests}
    while not core.idle:
        assert (turns := turns - 1), 'it does not end'
        for delta in core.step():
            deltas[delta.id].append(delta)
        core.check()
    return deltas


def tokens_of(deltas):
    return [token for delta in deltas for token in delta.tokens]


def said(prompt, **params):
    return continuation(prompt, SamplingParams(**params), VOCAB, 200)[0]


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger('lmdeploy')
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(level)


# -- how requests end ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('depth', [1, 2])
def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(depth):
    answer = said([1, 2, 3], max_new_tokens=10)
    params = SamplingParams(max_new_tokens=10, stop_ids=(answer[6],))
    core = make(depth=depth)
    deltas = serve(core, EngineInput('a', [1, 2, 3], params))['a']
    assert tokens_of(deltas) == answer[:6]
    assert [delta.finish.reason for delta in deltas if delta.finish] == ['stop']
    assert deltas[-1].finish.stop_id == answer[6]
    # the overlapped engine has launched one token too many, never more
    assert core.executor.computed_tokens == 3 + 6 + (depth - 1)


@pytest.mark.parametrize('depth', [1, 2])
@pytest.mark.parametrize('count', [1, 2, 7])
def test_max_new_tokens_costs_no_discarded_token(depth, count):
    core = make(depth=depth)
    deltas = serve(core, ask('a', [1, 2, 3], max_new_tokens=count))['a']
    assert tokens_of(deltas) == said([1, 2, 3], max_new_tokens=count) and deltas[-1].finish.reason == 'length'
    assert core.executor.computed_tokens == 3 + count - 1


def test_the_context_is_a_limit_too():
    core = make(session_len=20)
    deltas = serve(core, ask('a', [1] * 15, max_new_tokens=100))['a']
    assert len(tokens_of(deltas)) == 5 and deltas[-1].finish.reason == 'length'


def test_a_pool_smaller_than_the_context_is_a_limit_too():
    core = make(blocks=3, size=4)
    deltas = serve(core, ask('a', [1] * 5, max_new_tokens=100))['a']
    assert len(tokens_of(deltas)) == 3 * 4 + 1 - 5 and deltas[-1].finish.reason == 'length'


def test_no_new_tokens_means_the_prompt_only():
    core = make(budget=4)
    deltas = serve(core, ask('a', [1] * 9, max_new_tokens=0))['a']
    assert len(deltas) == 1 and deltas[0].finish.reason == 'length' and deltas[0].prompt_len == 9
    assert not any(plan.sample.any() for plan in core.executor.plans)


@pytest.mark.parametrize('tokens, code', [
    ([], 'LMD-330'), ([1] * 200, 'LMD-330'), ([VOCAB], 'LMD-331'), ([-1], 'LMD-331')])
def test_impossible_prompts_are_refused(tokens, code):
    core = make()
    [delta] = serve(core, ask('a', tokens))['a']
    error = delta.finish.error
    assert delta.finish.reason == 'error' and isinstance(error, RequestError) and error.code == code
    assert core.stats().rejected == 1 and core.stats().accepted == 0


def test_a_prompt_that_cannot_fit_alone_is_refused():
    core = make(blocks=4, size=4)
    fits, does_not = ask('a', [1] * 16), ask('b', [1] * 17)
    deltas = serve(core, fits, does_not)
    assert deltas['b'][0].finish.error.code == 'LMD-332'
    assert len(tokens_of(deltas['a'])) == 1 and deltas['a'][-1].finish.reason == 'length'


def test_an_input_of_impossible_kind_fails_alone():
    core = make()
    deltas = serve(core, ask('bad', ['x']), ask('good', [1], max_new_tokens=3))
    assert deltas['bad'][0].finish.error.code == 'LMD-337'
    assert tokens_of(deltas['good']) == said([1], max_new_tokens=3)


@pytest.mark.parametrize('depth', [1, 2])
@pytest.mark.parametrize('turns', range(8))
def test_an_abort_at_any_turn_leaves_nothing(depth, turns):
    core = make(depth=depth, slots=1)
    for name in 'ab':
        core.submit(ask(name, [1, 2, 3], max_new_tokens=5))
    for _ in range(turns):
        core.step()
    for name in 'abx':
        core.abort(name)
    ended = [delta.id for delta in core.step() if delta.finish and delta.finish.reason == 'abort']
    for _ in range(depth):
        assert not core.step(), 'a delta after the end'
        core.check()
    assert core.idle and core.stats().used_blocks == 0 and core.stats().cancelled == len(ended)


# -- failures --------------------------------------------------------------------------------------------------------

class PoisonedWord(Recorder):
    """Logits are not finite once the sequence contains token 13."""

    def __init__(self, capacity):
        super().__init__(capacity, poisoned=lambda sequence: 13 in sequence)


def test_bad_logits_end_one_request_and_its_blocks_are_not_found_again():
    core = make(executor=PoisonedWord, prefix=True, budget=4)
    good = ask('good', [2] * 9, max_new_tokens=20)
    deltas = serve(core, ask('bad', [1] * 8 + [13]), good)
    assert deltas['bad'][-1].finish.error.code == 'LMD-334'
    assert tokens_of(deltas['good']) == said([2] * 9, max_new_tokens=20)
    again = serve(core, ask('again', [1] * 9, max_new_tokens=2))['again']
    assert again[-1].cached_tokens == 0
    assert core.stats().non_finite == 1


def test_bad_logits_of_three_prompts_in_a_row_are_the_engines_failure():
    core = make(executor=PoisonedWord, slots=3)
    for i in range(2):
        serve(core, ask(f'same {i}', [13]))
    serve(core, ask('another', [13, 1]))
    serve(core, ask('good', [1], max_new_tokens=1))
    serve(core, *(ask(str(i), [13, i]) for i in range(2)),
          ask('good', [1], max_new_tokens=1))
    assert core.dead is None, 'a good row between them or beside them acquits the device'
    deltas = serve(core, *(ask(str(i), [13, i]) for i in range(3)),
                   ask('bystander', [1], max_new_tokens=50))
    assert isinstance(core.dead, EngineDead) and core.dead.code == 'LMD-340'
    assert all(deltas[name][-1].finish.reason == 'error' for name in deltas)
    assert core.stats().used_blocks == 0


@pytest.mark.parametrize('depth', [1, 2])
def test_an_executor_that_raises_ends_everything_with_its_cause(depth):
    core = make(depth=depth, slots=2, fail_at=4)
    deltas = serve(core, *(ask(str(i), [1, i], max_new_tokens=9) for i in range(5)))
    for request in deltas.values():
        error = request[-1].finish.error
        assert isinstance(error, EngineDead) and 'device error in step 4' in str(error)
    late = serve(core, ask('late', [1]))['late']
    assert late[0].finish.error is core.dead
    assert core.stats().failed == 5 and core.stats().rejected == 0


class FailingProcessor(Recorder):
    """Every row of a request with processors fails."""

    def run(self, plan):
        result = super().run(plan)
        for row, slot in enumerate(plan.slots.tolist()):
            if self.slots[slot].params.logits_processors and plan.sample[row]:
                result.status[row], result.errors[row] = PROCESSOR_FAILED, 'ZeroDivisionError: division by zero'
        return result


def test_a_logits_processor_that_raises_fails_its_request_only():
    core = make(executor=FailingProcessor)
    deltas = serve(core, ask('bad', [1], logits_processors=(max,)),
                   ask('good', [2], max_new_tokens=5))
    error = deltas['bad'][-1].finish.error
    assert error.code == 'LMD-336' and 'division by zero' in str(error)
    assert tokens_of(deltas['good']) == said([2], max_new_tokens=5)


class Grammar:
    """Allows the ids of one list in turn; raises where the list says so."""

    def __init__(self, script):
        self.script, self.at = script, 0

    def fill(self, mask):
        allowed = self.script[self.at]
        if allowed is ValueError:
            raise ValueError('no such state')
        if allowed is not None:
            mask[allowed // 32] = 1 << (allowed % 32)

    def accept(self, token):
        assert token == self.script[self.at]
        self.at += 1
        if self.at < len(self.script) and self.script[self.at] is KeyError:
            raise KeyError('accept')


@pytest.mark.parametrize('depth', [1, 2])
def test_a_grammar_decides_every_token(depth):
    core = make(depth=depth)
    deltas = serve(core, EngineInput('a', [1, 2], SamplingParams(max_new_tokens=3), grammar=Grammar([5, 999, 32])),
                   ask('b', [3], max_new_tokens=6))
    assert tokens_of(deltas['a']) == [5, 999, 32] and tokens_of(deltas['b']) == said([3], max_new_tokens=6)
    masked = [plan for plan in core.executor.plans if plan.masks is not None]
    assert len(masked) == 3
    for plan in masked:
        assert plan.masks.shape == (1, -(-VOCAB // 32)) and plan.masks.dtype == np.uint32
        assert PENDING not in plan.tokens[plan.query_start[plan.mask_rows[0]]:plan.query_start[plan.mask_rows[0] + 1]]


@pytest.mark.parametrize('depth', [1, 2])
@pytest.mark.parametrize('script, code', [
    ([ValueError], 'LMD-337'), ([5, ValueError], 'LMD-337'), ([5, KeyError], 'LMD-337'), ([None], 'LMD-335'),
    ([5, None], 'LMD-335')])
def test_a_grammar_that_fails_or_allows_nothing_fails_its_request_only(depth, script, code):
    core = make(depth=depth, slots=2)
    deltas = serve(core, EngineInput('bad', [1, 2], SamplingParams(), grammar=Grammar(script)),
                   *(ask(f'good {i}', [i], max_new_tokens=5) for i in range(3)))
    assert deltas['bad'][-1].finish.error.code == code
    for i in range(3):
        assert tokens_of(deltas[f'good {i}']) == said([i], max_new_tokens=5)


def test_a_leak_is_told_when_the_engine_falls_idle(caplog):
    core = make()
    core.scheduler.pool.allocate(2)
    logger = logging.getLogger('lmdeploy')
    logger.setLevel(logging.ERROR)
    logger.addHandler(caplog.handler)
    core.submit(ask('a', [1], max_new_tokens=1))
    core.step()
    logger.removeHandler(caplog.handler)
    assert '2 KV blocks are in use' in caplog.text
    with pytest.raises(AssertionError, match='references and tables differ'):
        core.check()


# -- budget, order, overlap ------------------------------------------------------------------------------------------

def test_running_streams_keep_pace_while_a_long_prompt_is_computed():
    core = make(budget=10, slots=4)
    for i in range(3):
        core.submit(ask(str(i), [i], max_new_tokens=150))
    core.step()
    core.submit(ask('long', [5] * 90, max_new_tokens=1))
    for _ in range(12):
        paced = [delta.id for delta in core.step() if delta.id != 'long']
        assert sorted(paced) == ['0', '1', '2'], 'a running stream skipped a step'
    plan = core.executor.plans[2]
    assert plan.num_tokens == 10 and np.diff(plan.query_start).tolist() == [1, 1, 1, 7], 'decodes come first'
    assert plan.outputs.tolist() == [OUTPUT_LAST] * 3 + [OUTPUT_NONE] and plan.sample.tolist() == [True] * 3 + [False]


def test_unknown_tokens_are_launched_as_pending():
    core = make(depth=2)
    serve(core, ask('a', [1, 2], max_new_tokens=5))
    assert [plan.tokens.tolist() for plan in core.executor.plans] == [[1, 2]] + [[PENDING]] * 4


def test_a_row_that_waits_for_python_code_is_never_pending():
    core = make(depth=2)
    serve(core, ask('a', [1, 2], max_new_tokens=5, logits_processors=(max,)))
    assert all(PENDING not in plan.tokens for plan in core.executor.plans)


def test_a_higher_priority_goes_first():
    core = make(slots=1)
    order = []
    for i, priority in enumerate([0, 2, 1, 2]):
        core.submit(EngineInput(str(i), [i], SamplingParams(max_new_tokens=2), priority=priority))
    while not core.idle:
        order += [delta.id for delta in core.step() if delta.finish]
    assert order == ['1', '3', '2', '0']


@pytest.mark.parametrize('depth', [1, 2])
def test_many_requests_in_a_pool_of_eight_blocks(depth):
    core = make(blocks=8, size=4, slots=16, budget=32, depth=depth)
    requests = [ask(str(i), [i, 1, 2] * (1 + i % 3), max_new_tokens=1 + i % 14) for i in range(64)]
    deltas = serve(core, *requests)
    for request in requests:
        expected = continuation(request.tokens, request.params, VOCAB, core.scheduler.session_len)[0]
        assert tokens_of(deltas[request.id]) == expected
    assert core.stats().preemptions > 0 and core.stats().finished == 64


def test_the_oldest_is_never_preempted():
    core = make(blocks=8, size=4, slots=8, depth=2)
    requests = [ask(str(i), [i] * 3, max_new_tokens=25) for i in range(6)]
    deltas = serve(core, *requests)
    assert core.stats().preemptions > 0
    slot = core.executor.plans[0].opened[0].slot
    oldest = [opened for plan in core.executor.plans for opened in plan.opened if opened.tokens[0] == 0]
    assert len(oldest) == 1 and oldest[0].slot == slot, 'the oldest was opened twice'
    assert all(len(tokens_of(d)) == 25 for d in deltas.values())


# -- sharing ---------------------------------------------------------------------------------------------------------

def test_a_prefix_is_found_again_by_the_same_salt_and_tenant_only():
    core = make(prefix=True)
    prompt, params = list(range(18)), SamplingParams(max_new_tokens=1)

    def cached(prompt, **scope):
        return serve(core, EngineInput('x', prompt, params, **scope))['x'][-1].cached_tokens

    assert cached(prompt) == 0
    assert cached(prompt) == 16
    assert cached(prompt[:16]) == 12, 'one token at least is computed'
    assert cached(prompt[:10] + [99] * 8) == 8
    assert cached([99] + prompt) == 0
    assert cached(prompt, salt=b's') == cached(prompt, tenant='t') == cached(prompt, adapter='a') == 0
    assert cached(prompt, salt=b's') == 16
    assert core.stats().prefix_hit_tokens == 16 + 12 + 8 + 16


def test_an_answer_is_found_again_as_part_of_the_next_prompt():
    core = make(prefix=True)
    prompt = [1, 2, 3]
    answer = tokens_of(serve(core, ask('a', prompt, max_new_tokens=14))['a'])
    again = serve(core, ask('b', prompt + answer + [5], max_new_tokens=1))['b']
    assert again[-1].cached_tokens == 16


def test_no_prefix_is_found_unless_asked_for():
    core = make()
    for name in 'ab':
        [*_, last] = serve(core, ask(name, [1] * 20, max_new_tokens=1))[name]
        assert last.cached_tokens == 0
    assert core.stats().cached_blocks == 0 and core.executor.computed_tokens == 40


@pytest.mark.parametrize('prefix', [False, True])
@pytest.mark.parametrize('depth', [1, 2])
def test_a_group_computes_its_prompt_once(depth, prefix):
    core = make(depth=depth, prefix=prefix, budget=8)
    prompt = list(range(33))
    requests = [EngineInput(str(i), prompt, SamplingParams(max_new_tokens=4, seed=i), share='g') for i in range(5)]
    deltas = serve(core, *requests)
    assert all(tokens_of(d) == said(prompt, max_new_tokens=4) for d in deltas.values())
    assert core.executor.computed_tokens == 33 + 4 * 1 + 5 * 3
    stats = core.stats()
    assert stats.used_blocks == 0 and (stats.cached_blocks > 0) == prefix


@pytest.mark.parametrize('turns', range(8))
def test_a_group_outlives_its_leader(turns):
    core = make(budget=8)
    prompt = list(range(33))
    for i in range(4):
        core.submit(EngineInput(str(i), prompt, SamplingParams(max_new_tokens=4), share='g'))
    for _ in range(turns):
        core.step()
    core.abort('0')
    answers = {str(i): [] for i in range(4)}
    while not core.idle:
        for delta in core.step():
            answers[delta.id] += delta.tokens
        core.check()
    assert core.stats().finished >= 3 and core.stats().cached_blocks == 0


def test_groups_of_one_name_in_turn_share_nothing_once_they_ended():
    core = make()
    for _ in range(2):
        before = core.executor.computed_tokens
        params = SamplingParams(max_new_tokens=1)
        serve(core, *(EngineInput(str(i), list(range(9)), params, share='g') for i in range(2)))
        assert core.executor.computed_tokens - before == 9 + 1


# -- outputs ---------------------------------------------------------------------------------------------------------

def rows_of(deltas):
    return [int(row[0]) for delta in deltas if delta.logits is not None for row in delta.logits]


@pytest.mark.parametrize('depth', [1, 2])
@pytest.mark.parametrize('count', [0, 1, 5])
@pytest.mark.parametrize('stop', [None, 0, 2])
def test_rows_of_logits_are_exactly_those_promised(depth, count, stop):
    prompt = list(range(21))
    answer = said(prompt, max_new_tokens=5)
    stops = (answer[stop],) if stop is not None else ()
    for wanted in ('all', 'generation'):
        core = make(depth=depth, budget=8, prefix=True)
        params = SamplingParams(max_new_tokens=count, output_logits=wanted, stop_ids=stops)
        deltas = serve(core, EngineInput('a', prompt, params))['a']
        tokens = prompt + tokens_of(deltas)
        scores = [score(np.array(tokens[:end + 1], np.int32)) for end in range(len(tokens))]
        generated = len(tokens) - 21
        if wanted == 'all':
            assert rows_of(deltas) == scores[:max(21, 21 + generated - 1)]
        else:
            assert rows_of(deltas) == scores[20:20 + generated]


def test_all_rows_come_once_although_the_request_was_preempted_and_the_prompt_was_cached():
    core = make(blocks=10, size=4, budget=8, prefix=True)
    prompt = list(range(8))
    serve(core, ask('warm', prompt, max_new_tokens=1))
    params = SamplingParams(max_new_tokens=20, output_logits='all')
    deltas = serve(core, *(EngineInput(str(i), prompt, params) for i in range(3)))
    assert core.stats().preemptions > 0
    for request in deltas.values():
        assert len(rows_of(request)) == 8 + 20 - 1 and request[-1].cached_tokens == 0
    whole = [plan for plan in core.executor.plans if OUTPUT_ALL in plan.outputs]
    assert whole


class WithLogprobs(Recorder):
    """Gives each accepted token the log-probability ``-token``."""

    def run(self, plan):
        result = super().run(plan)
        for row in range(plan.rows):
            drew = result.tokens[result.token_start[row]:result.token_start[row + 1]]
            result.logprobs[row] = Logprobs(-drew.astype(np.float32), drew[:, None], -drew[:, None].astype(np.float32))
        return result


def test_logprobs_are_those_of_the_tokens_that_were_kept():
    answer = said([1], max_new_tokens=5)
    core = make(executor=WithLogprobs)
    deltas = serve(core, ask('a', [1], max_new_tokens=9, logprobs=1, stop_ids=(answer[3],)))['a']
    assert [[-token for token in delta.tokens] for delta in deltas if delta.tokens] == [
        delta.logprobs.chosen.tolist() for delta in deltas if delta.logprobs]
    assert deltas[-1].logprobs is None and not deltas[-1].tokens


# -- drafts ----------------------------------------------------------------------------------------------------------

class Script:
    """Proposes the true continuation, wrong from a given draft on."""

    def __init__(self, right):
        self.right = right

    def propose(self, request, most):
        tokens = list(request.tokens)
        for i in range(min(4, most)):
            token = next_token(np.array(tokens, np.int32), VOCAB)
            tokens.append(token if i < self.right else (token + 1) % VOCAB)
        return tokens[len(request.tokens):]


@pytest.mark.parametrize('depth', [1, 2])
@pytest.mark.parametrize('right', range(5))
def test_drafts_change_the_number_of_steps_and_nothing_else(depth, right):
    capacity = Capacity(num_blocks=40, block_size=4, max_batch_size=4, max_step_tokens=32, session_len=100,
                        vocab_size=VOCAB)
    core = EngineCore(Recorder(capacity), capacity, depth=depth, drafter=Script(right), prefix_caching=True, debug=True)
    deltas = serve(core, ask('a', [1, 2, 3], max_new_tokens=21))['a']
    assert tokens_of(deltas) == said([1, 2, 3], max_new_tokens=21)
    # the first step draws one token, each later one the right drafts and one more
    assert core.stats().steps == 1 + -(-20 // (right + 1))

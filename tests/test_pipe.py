"""The Pipeline over a fake device: forms of prompts and results, streams, conversations, failures, threads, closing."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time

import pytest

from lmdeploy import GenerationConfig, Pipeline, PytorchEngineConfig, pipeline
from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.fake import FakeExecutor, continuation
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import LoadError, RequestError
from lmdeploy.executor.base import Capacity
from lmdeploy.frontend.frontend import AsyncFrontend
from lmdeploy.pipe import GREEDY_WARNING
from lmdeploy.tokenizer import Tokenizer
from tests.toy import write_model, write_tokenizer

VOCAB, SESSION = 303, 96


class Bare:
    """A template that shows its messages as 'role: content' lines."""

    name, stop_words, add_bos = 'bare', ['USER:'], False

    def render(self, messages, *, sequence_start=True, tools=None, enable_thinking=None):
        return [(f'{m["role"]}: {m["content"]}\n', True) for m in messages]


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer')
    (folder / 'config.json').write_text('{}')
    write_tokenizer(folder)
    return Tokenizer(str(folder))


@pytest.fixture
def build(tokenizer):
    pipes = []

    def make(**fake):
        capacity = Capacity(num_blocks=64, block_size=16, max_batch_size=8, max_step_tokens=64, session_len=SESSION,
                            vocab_size=VOCAB)
        executor = FakeExecutor(capacity, **fake)
        client = ThreadClient(lambda: EngineCore(executor, executor.start()))

        def stop():
            client.close()

        frontend = AsyncFrontend(client, tokenizer, Bare(), capacity, model_len=SESSION)
        pipes.append(Pipeline(frontend, model_name='toy', backend='pytorch', backend_config=None, stop=stop))
        return pipes[-1]

    yield make
    for pipe in pipes:
        pipe.close()


def expected(pipe, ids, new):
    params = SamplingParams(max_new_tokens=new, stop_ids=tuple(pipe.tokenizer.eos_token_ids))
    return continuation(ids, params, VOCAB, SESSION)[0]


def idle(pipe):
    for _ in range(200):
        if pipe.engine.stats().in_flight == 0 and pipe.engine.stats().used_blocks == 0:
            return True
        time.sleep(0.01)
    return False


RAW = GenerationConfig(max_new_tokens=9)


def test_a_single_prompt_gives_a_response_and_a_batch_a_list_in_order(build):
    pipe = build()
    prompts = [[5, 6, 7], [8], list(range(3, 40))]
    config = GenerationConfig(max_new_tokens=9)
    answers = pipe(prompts, gen_config=config)
    assert [a.index for a in answers] == [0, 1, 2]
    for ids, answer in zip(prompts, answers):
        assert answer.token_ids == expected(pipe, ids, 9)
        assert answer.text == pipe.tokenizer.decode(answer.token_ids)
        assert (answer.input_token_len, answer.generate_token_len, answer.finish_reason) == (len(ids), 9, 'length')
        assert pipe(ids, gen_config=config) == answer.__class__(**{**vars_of(answer), 'index': 0})
    assert pipe([]) == []
    assert idle(pipe)


def vars_of(response):
    return {name: getattr(response, name) for name in response.__dataclass_fields__}


def test_stream_deltas_add_up_to_the_whole(build):
    pipe = build()
    prompts = ['hello', [{'role': 'user', 'content': '你好'}], [9, 9]]
    whole = pipe(prompts, gen_config=RAW)
    texts, ids, ends = ['', '', ''], [[], [], []], {}
    for piece in pipe.stream_infer(prompts, gen_config=RAW):
        assert piece.index not in ends
        texts[piece.index] += piece.text
        ids[piece.index] += piece.token_ids
        assert piece.generate_token_len == len(ids[piece.index])
        if piece.finish_reason:
            ends[piece.index] = piece.finish_reason
    assert texts == [a.text for a in whole]
    assert ids == [a.token_ids for a in whole]
    assert [ends[i] for i in range(3)] == [a.finish_reason for a in whole]


def test_the_answer_ends_before_a_stop_text_that_spans_tokens(build):
    pipe = build()
    free = pipe([5], gen_config=GenerationConfig(max_new_tokens=20))
    assert len(free.text) > 12
    stop = free.text[7:11]
    cut = free.text.find(stop)
    answer = pipe([5], gen_config=GenerationConfig(max_new_tokens=20, stop_words=[stop]))
    assert (answer.text, answer.finish_reason) == (free.text[:cut], 'stop')
    assert answer.token_ids == free.token_ids[:len(answer.token_ids)]
    for rows in ('generation', 'all'):  # one prompt token: both are one row per generated token
        scored = pipe([5], gen_config=GenerationConfig(max_new_tokens=20, stop_words=[stop], output_logits=rows))
        assert len(scored.logits) == len(answer.token_ids)
    kept = pipe([5], gen_config=GenerationConfig(max_new_tokens=20, stop_words=[stop], include_stop_str_in_output=True))
    assert kept.text == free.text[:cut] + stop
    assert idle(pipe)


def test_several_answers_of_one_prompt(build):
    pipe = build()
    answers = pipe(['a', 'b'], gen_config=GenerationConfig(n=3, max_new_tokens=4))
    assert [a.index for a in answers] == list(range(6))
    assert [a.generate_token_len for a in answers] == [4] * 6
    assert idle(pipe)


def test_one_failing_prompt_does_not_fail_the_others(build):
    pipe = build()
    good, long, bad, last = pipe([[5], list(range(1, 97)), None, [6]], gen_config=RAW)
    assert (good.finish_reason, last.finish_reason) == ('length', 'length')
    assert (long.error_code, bad.error_code) == ('LMD-301', 'LMD-303')
    assert str(SESSION) in long.error_message
    assert 'error_code' not in repr(long)


def test_a_prompt_may_fill_the_context_but_for_one_token(build):
    pipe = build()
    answer = pipe(list(range(1, SESSION)), gen_config=RAW)
    assert (answer.generate_token_len, answer.finish_reason) == (1, 'length')


def test_non_finite_logits_end_one_request(build):
    pipe = build(poisoned=lambda ids: ids[0] == 7 and len(ids) > 3)
    good, bad = pipe([[5], [7]], gen_config=RAW)
    assert good.token_ids == expected(pipe, [5], 9)
    assert bad.finish_reason == 'error'
    assert bad.token_ids == expected(pipe, [7], 9)[:3]


def test_a_dead_engine_fails_everything_and_says_why(build):
    pipe = build(fail_at=3)
    answers = pipe([[5], [6]], gen_config=RAW)
    assert {a.finish_reason for a in answers} == {'error'}
    assert all('device error in step 3' in a.error_message for a in answers)
    assert pipe([5], gen_config=RAW).finish_reason == 'error'


def test_the_greedy_warning_comes_once_a_call(build, caplog):
    pipe = build()
    logger = logging.getLogger('lmdeploy')
    logger.addHandler(caplog.handler)
    try:
        pipe(['a', 'b'], gen_config=GenerationConfig(max_new_tokens=1, temperature=0.6))
        assert [r.getMessage() for r in caplog.records] == [GREEDY_WARNING]
        caplog.clear()
        pipe(['a', 'b'], gen_config=GenerationConfig(max_new_tokens=1, do_sample=True))
        assert caplog.records == []
    finally:
        logger.removeHandler(caplog.handler)


def test_a_conversation_remembers(build):
    pipe = build()
    session = pipe.chat('one', gen_config=RAW)
    first = session.response
    assert first.finish_reason != 'error', first.error_message
    again = pipe.chat('two', session=session, gen_config=RAW)
    assert again is session
    assert session.history == [('one', first.text), ('two', session.response.text)]
    direct = pipe([{'role': 'user', 'content': 'one'}, {'role': 'assistant', 'content': first.text},
                   {'role': 'user', 'content': 'two'}], gen_config=RAW)
    assert direct.token_ids == session.response.token_ids
    assert repr(session).startswith('USER:\none\nASSISTANT:\n')
    streamed = pipe.chat('one', gen_config=RAW, stream_response=True)
    assert ''.join(piece.text for piece in streamed.generator) == first.text
    assert streamed.history == [('one', first.text)]
    with pipe.session(RAW) as own:
        assert own('one', stream_response=False).text == first.text
        assert ''.join(piece.text for piece in own('two')) == session.response.text
    assert own.history == []


def test_a_session_is_one_that_chat_gave(build):
    with pytest.raises(RequestError, match="session='mine'"):
        build().chat('one', session='mine')


def test_closing_a_stream_stops_the_request(build):
    pipe = build(poisoned=lambda ids: time.sleep(0.02) or False)  # slow enough to be stopped half-way
    stream = pipe.stream_infer([5], gen_config=GenerationConfig(max_new_tokens=80))
    next(stream)
    stream.close()
    assert idle(pipe)
    assert pipe.engine.stats().cancelled == 1


def test_ctrl_c_stops_the_requests_and_leaves_a_usable_pipeline(build):
    pipe = build(poisoned=lambda ids: time.sleep(0.02) or False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            pipe([[i] for i in range(1, 50)], gen_config=GenerationConfig(max_new_tokens=80))
    finally:
        signal.signal(signal.SIGINT, before)
    assert idle(pipe)
    assert pipe([5], gen_config=RAW).token_ids == expected(pipe, [5], 9)


def test_many_threads_share_one_pipeline(build):
    pipe = build()
    wrong = []

    def work(i):
        for j in range(10):
            ids = [1 + i, 1 + j]
            if pipe(ids, gen_config=RAW).token_ids != expected(pipe, ids, 9):
                wrong.append(ids)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert idle(pipe)


def test_close_is_idempotent_and_final(build):
    with build() as pipe:
        pipe([5], gen_config=RAW)
    pipe.close()
    with pytest.raises(RequestError, match='LMD-315'):
        pipe([5], gen_config=RAW)


def test_async_generate_in_the_callers_loop(build):
    pipe = build()

    async def main():
        pieces = [piece async for piece in pipe.generate(input_ids=[5], gen_config=RAW)]
        whole = [piece async for piece in pipe.generate(input_ids=[5], gen_config=RAW, stream_response=False)]
        return pieces, whole

    pieces, (whole,) = asyncio.run(main())
    assert ''.join(piece.response for piece in pieces) == whole.response
    assert (whole.token_ids, whole.finish_reason) == (expected(pipe, [5], 9), 'length')
    assert (whole.history_token_len, whole.input_token_len, whole.generate_token_len) == (0, 1, 9)
    assert repr(whole).startswith(f'GenOut(response={whole.response!r}, history_token_len=0, input_token_len=1, ')


def test_async_generate_keeps_several_answers_apart(build):
    pipe = build()
    config = GenerationConfig(n=2, max_new_tokens=6, do_sample=True, random_seed=1)

    async def main():
        return [out async for out in pipe.generate('a', gen_config=config, stream_response=False)]

    answers = asyncio.run(main())
    assert sorted(out.index for out in answers) == [0, 1]
    assert [out.generate_token_len for out in answers] == [6, 6]


def test_stopping_a_session_ends_its_request_and_nothing_else(build):
    pipe = build(poisoned=lambda ids: time.sleep(0.005) or False)
    config = GenerationConfig(max_new_tokens=80, ignore_eos=True)

    async def main():
        outs = []
        async for out in pipe.generate([5], session_id=7, gen_config=config):
            outs.append(out)
            if len(outs) == 2:
                with pytest.raises(RequestError, match='LMD-318'):
                    await anext(pipe.generate([6], session_id=7))
                await pipe.stop_session(7)
        await pipe.stop_session(7)  # nothing runs: nothing happens
        again = [out async for out in pipe.generate([5], session_id=7, gen_config=RAW, stream_response=False)]
        return outs, again

    outs, (again,) = asyncio.run(main())
    assert (outs[-1].finish_reason, again.finish_reason) == ('abort', 'length')
    assert outs[-1].generate_token_len < 80
    assert idle(pipe)


def test_what_generate_cannot_do_says_so(build):
    pipe = build()

    async def first(*args, **kwargs):
        return await anext(pipe.generate(*args, **kwargs))

    for code, args, options in [
            ('LMD-313', ('a',), {'sequence_start': False}), ('LMD-313', ('a',), {'step': 5}), ('LMD-319', ([],), {}),
            ('LMD-319', (['a', 'b'],), {}), ('LMD-303', (), {}), ('LMD-314', ('a',), {'gen_config': {'n': 1}}),
            ('LMD-310', ('a',), {'gen_config': GenerationConfig(n=10**9)})]:
        with pytest.raises(RequestError, match=code):
            asyncio.run(first(*args, **options))
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(asyncio.wait_for(first('a'), 5))
        except RequestError as error:
            os._exit(int(error.code == 'LMD-316'))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    pipe.close()
    with pytest.raises(RequestError, match='LMD-315'):
        asyncio.run(first('a'))


def test_a_new_turn_stops_the_one_that_runs(build):
    pipe = build(poisoned=lambda ids: time.sleep(0.005) or False)
    session = pipe.chat('one', gen_config=GenerationConfig(max_new_tokens=40), stream_response=True)
    said = next(session.generator).text
    kept = session.generator
    pipe.chat('two', session=session, gen_config=RAW)
    assert session.history == [('one', said), ('two', session.response.text)]
    assert list(kept) == []
    direct = pipe([{'role': 'user', 'content': 'one'}, {'role': 'assistant', 'content': said},
                   {'role': 'user', 'content': 'two'}], gen_config=RAW)
    assert direct.token_ids == session.response.token_ids
    assert idle(pipe)


def test_a_turn_is_one_prompt_with_one_answer(build):
    pipe = build()
    session = pipe.chat('one', gen_config=RAW)
    for prompt, config in [(['a', 'b'], RAW), ([5, 6], RAW), ('a', GenerationConfig(n=2))]:
        with pytest.raises(RequestError, match='LMD-319'):
            pipe.chat(prompt, session=session, gen_config=config)
    assert len(session.history) == 1


def test_a_prompt_that_is_none_fails_once_for_each_of_its_answers(build):
    pipe = build()
    answers = pipe(['a', None, 'b'], gen_config=GenerationConfig(n=2, max_new_tokens=2))
    assert [(a.index, a.finish_reason == 'error') for a in answers] == [
        (0, False), (1, False), (2, True), (3, True), (4, False), (5, False)]


def test_what_is_not_there_says_so(build):
    pipe = build()
    with pytest.raises(RequestError, match='LMD-317'):
        pipe.get_reward_score([1, 2])
    with pytest.raises(RequestError, match='LMD-313'):
        pipe('a', adapter_name='x')


def test_a_model_without_weights(tmp_path):
    """``empty_init`` needs the configuration and the tokenizer alone."""
    folder = write_model(tmp_path / 'model')
    (folder / 'model.safetensors').unlink()
    with pytest.raises(LoadError, match='LMD-'):
        pipeline(str(folder), PytorchEngineConfig(device_type='cpu'))
    with pipeline(str(folder), PytorchEngineConfig(device_type='cpu', empty_init=True)) as pipe:
        assert pipe('time', GenerationConfig(max_new_tokens=5, ignore_eos=True)).generate_token_len == 5

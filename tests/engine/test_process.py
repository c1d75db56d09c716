"""The engine's own program with a tiny model: the same answers as in this process, and it never outlives its parent."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.remote import ProcessClient
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import LmdeployError, LoadError
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.frontend.bad_words import BadWords
from lmdeploy.frontend.frontend import AsyncFrontend
from lmdeploy.frontend.prompts import Prompt
from lmdeploy.grammar.compiler import Compiler
from lmdeploy.grammar.formats import regex_source
from lmdeploy.messages import GenerationConfig
from lmdeploy.tokenizer import Tokenizer
from tests.toy import write_model

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = EngineConfig(dtype='float32', device='cpu', num_blocks=40, depth=2, prefix_caching=True)
SECONDS = 120.0


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Here and in children: parents and children that both want all cores would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('OMP_NUM_THREADS', '1')
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp('process') / 'model')


@asynccontextmanager
async def started(folder):
    client = ProcessClient(CONFIG, folder)
    try:
        await client.ready()
        yield client
    finally:
        await client.aclose()


async def collect(client, request):
    async with aclosing(client.submit(request)) as stream:
        return [delta async for delta in stream]


@pytest.fixture(scope='module')
def tokenizer(folder):
    return Tokenizer(str(folder))


@pytest.fixture(scope='module')
def grammar(tokenizer):
    return Compiler(tokenizer, tokenizer.vocab_size).compile(regex_source('[a-f]{4,12}'))


def requests(tokenizer, grammar):
    """All kinds of requests, anew for each engine: matchers have a state."""
    texts = ('the quick brown', 'time', 'def f(x):', '你好', 'one two three ' * 9)
    prompts = [tokenizer.encode(text) for text in texts]
    bans = (BadWords(['a', 'e'], tokenizer, len(prompts[0])),)
    stop = (tokenizer.eos_token_id,)
    kinds = [
        {}, {'greedy': False, 'seed': 7, 'top_k': 40, 'top_p': 0.9}, {'repetition_penalty': 1.3, 'min_new_tokens': 4},
        {'logprobs': 3}, {'output_logits': 'all', 'output_hidden': 'generation'}, {'stop_ids': stop},
        {'logit_bias': ((5, 50.0),)}, {'bad_sequences': ((5, 6),), 'banned_ids': (7,)},
    ]  # fmt: skip
    for i, kind in enumerate(kinds):
        yield EngineInput(f'k{i}', prompts[i % len(prompts)], SamplingParams(max_new_tokens=24, **kind))
    yield EngineInput('words', prompts[0], SamplingParams(max_new_tokens=24, logits_processors=bans))
    yield EngineInput('grammar', prompts[1], SamplingParams(max_new_tokens=24, stop_ids=stop),
                      grammar=grammar.matcher(stop))


def summary(deltas):
    """What must not depend on where the engine runs."""
    def rows(values):
        found = [np.asarray(value) for value in values if value is not None]
        return np.concatenate(found) if found else None

    return {
        'tokens': [token for delta in deltas for token in delta.tokens],
        'finish': (deltas[-1].finish.reason, deltas[-1].finish.stop_id),
        'prompt_len': deltas[-1].prompt_len,
        'chosen': rows(delta.logprobs.chosen for delta in deltas if delta.logprobs),
        'ids': rows(delta.logprobs.ids for delta in deltas if delta.logprobs),
        'values': rows(delta.logprobs.values for delta in deltas if delta.logprobs),
        'logits': rows(delta.logits for delta in deltas),
        'hidden': rows(delta.hidden for delta in deltas),
    }


def test_the_same_answers_as_in_this_process(folder, tokenizer, grammar):
    async def here():
        executor = LocalExecutor(CONFIG, folder)
        client = ThreadClient(lambda: EngineCore(executor, executor.start(), depth=2, prefix_caching=True))
        found = [summary(await collect(client, request)) for request in requests(tokenizer, grammar)]
        await asyncio.to_thread(client.close)
        return found

    async def there():
        async with started(folder) as client:
            found = [summary(await collect(client, request)) for request in requests(tokenizer, grammar)]
            together = await asyncio.gather(*(collect(client, request) for request in requests(tokenizer, grammar)))
            assert [summary(deltas)['tokens'] for deltas in together] == [answer['tokens'] for answer in found]
            stats = client.stats()
            assert stats.finished == stats.accepted == 20 and not stats.used_blocks
            return found

    ours, theirs = asyncio.run(here()), asyncio.run(asyncio.wait_for(there(), SECONDS))
    for mine, other in zip(ours, theirs):
        for name, value in mine.items():
            assert np.array_equal(np.asarray(value), np.asarray(other[name])), name
    assert ours[3]['ids'].shape == (24, 3) and ours[4]['logits'] is not None and ours[4]['hidden'] is not None
    assert not set('ae') & set(tokenizer.decode(theirs[-2]['tokens']))
    assert set(tokenizer.decode(theirs[-1]['tokens'])) <= set('abcdef')


def test_a_frontend_serves_by_it(folder, tokenizer):
    async def main():
        from lmdeploy.chat import resolve_template

        template = resolve_template(str(folder), tokenizer, None)
        async with started(folder) as client:
            frontend = AsyncFrontend(client, tokenizer, template, client.capacity, client.context_len)
            gen = GenerationConfig(max_new_tokens=12, bad_words=['e'], logprobs=1, n=2,
                                   output_last_hidden_state='all')
            outputs = [o async for o in frontend.generate(Prompt(text='hello'), gen)]
            last = [o for o in outputs if o.finish_reason]
            assert [o.finish_reason for o in last] == ['length'] * 2 and not any(o.error for o in outputs)
            assert all('e' not in o.text for o in outputs)
            assert all(len(o.hidden) == o.input_len + 11 for o in last)
            assert await frontend.cross_entropy([1, 2, 3, 4, 5]) > 0
            refused = GenerationConfig(logits_processors=[lambda ids, logits: logits])
            (output,) = [o async for o in frontend.generate(Prompt(text='hello'), refused)]
            assert output.error.code == 'LMD-341'

    asyncio.run(asyncio.wait_for(main(), SECONDS))


def test_a_model_without_a_tokenizer_serves_tokens(folder, tokenizer, tmp_path):
    bare = tmp_path / 'bare'
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns('tokenizer*'))
    words = BadWords(['x'], tokenizer, 2)

    async def main():
        async with started(bare) as client:
            deltas = await collect(client, EngineInput('a', [1, 2], SamplingParams(max_new_tokens=5)))
            assert sum(len(delta.tokens) for delta in deltas) == 5
            banned = SamplingParams(max_new_tokens=5, logits_processors=(words,))
            (delta,) = await collect(client, EngineInput('b', [1, 2], banned))
            assert isinstance(delta.finish.error, LoadError)
            assert client.stats().rejected == 1

    asyncio.run(asyncio.wait_for(main(), SECONDS))


def test_what_is_wrong_with_a_model_is_told_as_in_this_process(folder, tmp_path):
    broken = tmp_path / 'broken'
    shutil.copytree(folder, broken)
    (broken / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:5000])
    for path in (broken, tmp_path / 'nothing'):
        with pytest.raises(LmdeployError) as here:
            LocalExecutor(CONFIG, path).start()

        async def main(path=path):
            client = ProcessClient(CONFIG, path)
            try:
                await client.ready()
            finally:
                await client.aclose()

        with pytest.raises(LmdeployError) as there:
            asyncio.run(asyncio.wait_for(main(), SECONDS))
        assert type(here.value) is type(there.value) and str(here.value) == str(there.value)


PARENT = """
import asyncio, sys, time
from lmdeploy.config.engine import EngineConfig
from lmdeploy.engine.remote import ProcessClient
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams

async def main():
    client = ProcessClient(EngineConfig(dtype='float32', device='cpu', num_blocks=40), sys.argv[1])
    print(client.pid, flush=True)
    if sys.argv[2] == 'loading':
        await asyncio.sleep(600)
    await client.ready()
    async for _ in client.submit(EngineInput('a', [1, 2], SamplingParams(max_new_tokens=500))):
        if sys.argv[2] == 'streaming':
            print('streaming', flush=True)
            time.sleep(600)
    print('idle', flush=True)
    if sys.argv[2] == 'exit':
        return
    time.sleep(600)

asyncio.run(main())
"""


def gone(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except FileNotFoundError:
        return True


@pytest.mark.parametrize('when', ['loading', 'streaming', 'idle', 'exit'])
def test_the_engine_does_not_outlive_its_parent(folder, when):
    parent = subprocess.Popen([sys.executable, '-c', PARENT, str(folder), when], cwd=ROOT, stdout=subprocess.PIPE,
                              text=True)
    try:
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        if when != 'loading':
            assert parent.stdout.readline().strip() == ('streaming' if when == 'streaming' else 'idle')
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if when in ('streaming', 'idle') else ():
            os.kill(pid, number)  # these are for the parent to act on
        time.sleep(0.1)
        assert when == 'exit' or not gone(pid)
    finally:
        if when != 'exit':
            parent.kill()
        parent.wait(10)
        parent.stdout.close()
    end = time.monotonic() + 2
    while not gone(pid):
        assert time.monotonic() < end, 'an orphan'
        time.sleep(0.01)

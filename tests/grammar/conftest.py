"""A toy tokenizer, a compiler for it, and an engine over a fake device that draws any allowed token."""

from __future__ import annotations

import pytest

from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.fake import FakeExecutor
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.executor.base import Capacity
from lmdeploy.grammar.compiler import Compiler
from lmdeploy.tokenizer import Tokenizer
from tests.toy import write_tokenizer

VOCAB = 303


@pytest.fixture(scope='session')
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer')
    (folder / 'config.json').write_text('{}')
    write_tokenizer(folder)
    return Tokenizer(str(folder))


@pytest.fixture(scope='session')
def compiler(tokenizer):
    return Compiler(tokenizer, VOCAB)


@pytest.fixture
def answers(tokenizer, compiler):
    """Answers of a fake engine to prompts under one grammar: ``[(tokens, finish)]``, in the prompts' order."""

    def run(source, prompts, *, new=256, depth=1, blocks=512, slots=8, aborts=()):
        capacity = Capacity(num_blocks=blocks, block_size=16, max_batch_size=slots, max_step_tokens=64,
        session_len=512,
                            vocab_size=VOCAB)
        executor = FakeExecutor(capacity, delayed=depth > 1)
        core = EngineCore(executor, executor.start(), depth=depth)
        stops = tuple(tokenizer.eos_token_ids)
        for i, prompt in enumerate(prompts):
            grammar = compiler.compile(source).matcher(stops) if source else None
            core.submit(EngineInput(str(i), prompt, SamplingParams(max_new_tokens=new, stop_ids=stops),
            grammar=grammar))
        tokens = {str(i): [] for i in range(len(prompts))}
        finish = {}
        while not core.idle:
            for delta in core.step():
                tokens[delta.id] += delta.tokens
                if delta.finish is not None:
                    finish[delta.id] = delta.finish
        run.preemptions = core.scheduler.counters.preemptions
        return [(tokens[str(i)], finish[str(i)]) for i in range(len(prompts))]

    return run

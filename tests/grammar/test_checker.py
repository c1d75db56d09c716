"""Checker: what passes here is compiled in the engine's process, and what does not never gets there."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

import numpy as np
import pytest

from lmdeploy.engine import wire
from lmdeploy.engine.process import Intake
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import RequestError
from lmdeploy.grammar.checker import CACHE_CHARACTERS, Checker
from lmdeploy.grammar.formats import Source
from lmdeploy.grammar.sandbox import Sandbox
from tests.grammar.conftest import VOCAB

GOOD = Source('json', '{"enum": ["red", "green"]}')


@pytest.fixture
def checker():
    made = Checker(Sandbox())
    yield made
    made.close()


def test_a_checked_grammar_becomes_the_compiled_one_in_the_engine_s_process(checker, tokenizer, compiler):
    stops = tuple(tokenizer.eos_token_ids)
    named = asyncio.run(checker.prepare(GOOD)).matcher(stops)
    given = EngineInput('r', [5, 6], SamplingParams(max_new_tokens=8, stop_ids=stops), grammar=named)
    loaded: Future = Future()
    loaded.set_result(tokenizer)
    built = Intake(loaded, VOCAB)(wire.Submit.of(given), []).grammar
    direct = compiler.compile(GOOD).matcher(stops)
    masks = np.zeros((2, -(-VOCAB // 32)), np.uint32)
    for token in tokenizer.encode('"red"'):
        built.fill(masks[0])
        direct.fill(masks[1])
        assert (masks[0] == masks[1]).all() and masks[0].any()
        built.accept(token)
        direct.accept(token)


def test_what_cannot_be_used_is_refused_and_what_was_good_is_not_tried_again(checker, monkeypatch):
    tried = []
    check = checker._sandbox.check
    monkeypatch.setattr(checker._sandbox, 'check', lambda source: tried.append(source) or check(source))
    for _ in range(2):
        with pytest.raises(RequestError, match='LMD-325'):
            asyncio.run(checker.prepare(Source('regex', '[a')))
        asyncio.run(checker.prepare(GOOD))
    assert tried == [Source('regex', '[a'), GOOD, Source('regex', '[a')]
    with pytest.raises(RequestError, match='LMD-328'):
        asyncio.run(checker.prepare(GOOD)).matcher(())


def test_the_memory_of_good_grammars_is_bounded(checker, monkeypatch):
    monkeypatch.setattr(checker._sandbox, 'check', lambda source: None)
    for i in range(100):
        asyncio.run(checker.prepare(Source('regex', f'{i}' + 'a' * 60_000)))
    held = [len(source.text) for source in checker._good]
    assert sum(held) == checker._held <= CACHE_CHARACTERS and len(held) > 50

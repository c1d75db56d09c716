"""Compiler, cache and matcher: masks are exact, copies independent, failures end one request."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import numpy as np
import pytest

from lmdeploy.errors import RequestError
from lmdeploy.grammar.automata import build
from lmdeploy.grammar.compiler import Compiler
from lmdeploy.grammar.formats import Source, regex_source, schema_source
from lmdeploy.grammar.matcher import Matcher
from lmdeploy.grammar.vocabulary import TokenBytes
from tests.grammar.conftest import VOCAB

pytest.importorskip('llguidance')

WORDS = -(-VOCAB // 32)


def allowed(matcher, words=WORDS):
    mask = np.full(words, 0xdeadbeef, np.uint32)
    matcher.fill(mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder='little')).tolist())


def texts(tokenizer, tokens):
    return {tokenizer.token_bytes(token) for token in tokens}


@pytest.fixture
def stops(tokenizer):
    return tuple(tokenizer.eos_token_ids)


def say(matcher, tokenizer, text):
    for byte in text.encode():
        matcher.accept(next(t for t in range(VOCAB) if tokenizer.token_bytes(t) == bytes([byte])))


def test_the_mask_has_every_token_that_may_follow_and_no_other(compiler, tokenizer, stops):
    spellings = texts(tokenizer, range(VOCAB)) - {b''}

    def beginnings(*rests):
        return {spelling for spelling in spellings if any(rest.startswith(spelling) for rest in rests)}

    matcher = compiler.compile(regex_source('(one|on|the)( two)?')).matcher(stops)
    assert texts(tokenizer, allowed(matcher)) == beginnings(b'one two', b'on two', b'the two')
    say(matcher, tokenizer, 'on')
    got = allowed(matcher)
    assert set(stops) < got
    assert texts(tokenizer, got - set(stops)) == beginnings(b'e two', b' two')


def test_after_the_end_only_the_requests_stop_tokens_are_allowed(compiler, tokenizer):
    for stops in [tuple(tokenizer.eos_token_ids), (*tokenizer.eos_token_ids, 5, 299), (7,)]:
        matcher = compiler.compile(schema_source({'const': 1})).matcher(stops)
        assert not allowed(matcher) & set(stops)
        say(matcher, tokenizer, '1')
        assert allowed(matcher) == set(stops)


def test_control_tokens_are_never_text(compiler, tokenizer, stops):
    matcher = compiler.compile(regex_source(r'<\|im_start\|>')).matcher(stops)
    assert texts(tokenizer, allowed(matcher)) == {b'<'}
    free = compiler.compile(regex_source('(?s).*')).matcher(stops)
    assert not allowed(free) & set(tokenizer.control_tokens.values()) - set(stops)


@pytest.mark.parametrize('size', [VOCAB, 320, 321, 500])
def test_masks_cover_the_models_rows_whatever_the_tokenizer_knows(size, tokenizer):
    assert len(TokenBytes(tokenizer, size).tokens) == size
    matcher = Compiler(tokenizer, size).compile(regex_source('[a-z]+')).matcher((7,))
    got = allowed(matcher, -(-size // 32))
    assert got
    assert max(got) < VOCAB
    assert all(tokenizer.token_bytes(token).isalpha() for token in got)


def test_a_model_without_an_end_token_is_refused(tokenizer):
    class Endless:
        vocabulary, vocab_size, eos_token_ids = tokenizer.vocabulary, tokenizer.vocab_size, set()
        special_ids, control_tokens = tokenizer.special_ids, tokenizer.control_tokens
        token_bytes = tokenizer.token_bytes

    with pytest.raises(RequestError) as caught:
        Compiler(Endless(), VOCAB).compile(regex_source('a'))
    assert caught.value.code == 'LMD-328'


def test_a_request_without_a_stop_token_is_refused(compiler):
    with pytest.raises(RequestError) as caught:
        compiler.compile(regex_source('a')).matcher(())
    assert caught.value.code == 'LMD-328'


def test_matchers_of_one_grammar_are_independent(compiler, tokenizer, stops):
    compiled = compiler.compile(regex_source('abc'))
    first, second = compiled.matcher(stops), compiled.matcher(stops)
    say(first, tokenizer, 'ab')
    assert texts(tokenizer, allowed(second)) == {b'a'}
    assert texts(tokenizer, allowed(first)) == {b'c'}
    assert texts(tokenizer, allowed(compiled.matcher(stops))) == {b'a'}


def test_a_failed_matcher_allows_nothing_ever_after(compiler, tokenizer, stops, caplog):
    matcher = compiler.compile(regex_source('abc')).matcher(stops)
    say(matcher, tokenizer, 'x')
    assert allowed(matcher) == set()
    say(matcher, tokenizer, 'a')
    assert allowed(matcher) == set()


class Panic(BaseException):
    """What a panic of the library looks like."""


Panic.__name__ = 'PanicException'


class Broken:
    def __init__(self, error):
        self.error = error

    def unsafe_compute_mask_ptr(self, address, size):
        raise self.error

    consume_token = is_error = get_error = unsafe_compute_mask_ptr


@pytest.mark.parametrize('error', [Panic('index out of bounds'), ValueError('wrong size'), MemoryError()])
def test_a_panic_ends_the_request_and_not_the_engine(error, stops):
    matcher = Matcher(Source('regex', 'a'), Broken(error), end_id=3, stop_ids=stops)
    assert allowed(matcher) == set()
    matcher.accept(3)
    assert allowed(matcher) == set()


def test_ctrl_c_is_no_failure_of_a_grammar(stops):
    matcher = Matcher(Source('regex', 'a'), Broken(KeyboardInterrupt()), end_id=3, stop_ids=stops)
    with pytest.raises(KeyboardInterrupt):
        allowed(matcher)


@pytest.mark.parametrize('source', [Source('json', '{"type":"foo"}'), Source('json', '{"frob'), Source('regex',
        '('), Source('json', '[]'),
                                    Source('json', '{"type":"string","format":"nope"}'), Source('regex', '[a&&b]')])
def test_what_the_library_refuses_is_an_error_with_its_reason(source, compiler):
    with pytest.raises(RequestError) as caught:
        compiler.compile(source)
    assert caught.value.code == 'LMD-325'
    assert caught.value.params['reason']


def test_a_panic_while_compiling_is_an_error(monkeypatch):
    import llguidance

    def panic(text):
        raise Panic('overflow')

    monkeypatch.setattr(llguidance, 'LLMatcher', type('LLMatcher', (), {'grammar_from_regex': staticmethod(panic)}))
    with pytest.raises(RequestError) as caught:
        build(None, 'regex', 'a')
    assert caught.value.params['reason'] == 'PanicException: overflow'


def test_the_cache_keeps_the_latest_within_its_bytes(tokenizer):
    compiler = Compiler(tokenizer, VOCAB, cache_bytes=4 * ((64 << 10) + 128))
    sources = [regex_source(c) for c in 'abcdef']
    kept = [compiler.compile(source) for source in sources]
    assert compiler.compile(sources[5]) is kept[5]
    assert compiler.compile(sources[2]) is kept[2]
    assert compiler.compile(sources[0]) is not kept[0]  # takes the place of d
    assert compiler.compile(sources[2]) is kept[2]
    assert compiler.compile(sources[3]) is not kept[3]
    large = regex_source('x{3}' * 100)
    assert compiler.compile(large).source == large
    assert len(compiler._cache) <= 4


def test_many_threads_and_loops_compile_at_once(tokenizer, stops):
    compiler = Compiler(tokenizer, VOCAB)
    failures = []

    async def several(offset):
        sources = [regex_source(f'[a-z]{{{1 + (i + offset) % 7}}}') for i in range(20)]
        compiled = await asyncio.gather(*(compiler.prepare(source) for source in sources))
        for one, source in zip(compiled, sources):
            assert one.source == source
            assert allowed(one.matcher(stops))

    def work(offset):
        try:
            asyncio.run(several(offset))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    compiler.close()
    assert not failures


def test_the_loop_runs_while_a_grammar_compiles(tokenizer):
    compiler = Compiler(tokenizer, VOCAB)
    schema = {'type': 'object', 'properties': {f'property {i}': {'type': 'string'} for i in range(900)}}

    async def both():
        task = asyncio.ensure_future(compiler.prepare(schema_source(schema)))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.001)
            turns += 1
        await task
        return turns

    assert asyncio.run(both()) > 3
    compiler.close()


def test_without_the_package_the_error_names_the_extra():
    program = """
import sys
sys.modules['llguidance'] = None
import asyncio
from lmdeploy import GenerationConfig
from lmdeploy.frontend import params
from lmdeploy.grammar.compiler import Compiler
from lmdeploy.grammar.formats import read_format
gen = GenerationConfig(response_format={'type': 'json_object'})
params.check(gen, 100)
try:
    asyncio.run(Compiler(None, 100).prepare(read_format(gen.response_format)))
except Exception as error:
    print(error.code, error)
"""
    out = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=60)
    assert out.stdout.startswith('LMD-327'), out.stderr
    assert 'llguidance (of the extra "serve")' in out.stdout


def test_nothing_loads_the_package_before_the_first_grammar():
    program = ('import sys; import lmdeploy.frontend.frontend; '
               'print([m for m in ("llguidance", "torch") if m in sys.modules])')
    out = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == '[]', out.stderr

"""Grammars made to hurt: each is answered in time, by an error or a grammar that works, and the next one is served."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lmdeploy.errors import RequestError
from lmdeploy.grammar.compiler import Compiler
from lmdeploy.grammar.formats import Source, read_format
from lmdeploy.grammar.sandbox import Sandbox
from tests.grammar.conftest import VOCAB

pytest.importorskip('llguidance')

SECONDS = 3.0


def deep(depth):
    schema = True
    for _ in range(depth):
        schema = {'type': 'object', 'properties': {'a': schema}}
    return schema


def shared(depth):
    """Two references to the same list, again and again: 2 ** depth values in ``depth`` objects."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return {'enum': [value]}


def cyclic():
    schema = {}
    schema['properties'] = {'a': schema}
    return schema


def patterns(*texts):
    return {'allOf': [{'type': 'string', 'pattern': text} for text in texts]}


WIDE = {'type': 'object', 'properties': {f'property {i}': {'type': 'string',
'pattern': f'^{i}.*x$'} for i in range(900)}}

SCHEMAS = {
    '60,000 deep': deep(60_000),
    '31 deep': deep(31),
    'shared 2 ** 60': shared(60),
    'cyclic in memory': cyclic(),
    '10 MB enum': {'enum': ['x' * 100 + str(i) for i in range(100_000)]},
    '10 MB text': {'const': 'x' * 10_000_000},
    '1,000 long entries': {'enum': [f'{i} some words of an entry' for i in range(1000)]},
    'remote reference': {'$ref': 'https://example.com/schema.json'},
    'file reference': {'$ref': 'file:///etc/passwd'},
    'reference to itself': {'$ref': '#'},
    'cyclic references': {'$ref': '#/$defs/a', '$defs': {'a': {'$ref': '#/$defs/b'}, 'b': {'$ref': '#/$defs/a'}}},
    'cyclic any of': {'$ref': '#/$defs/a', '$defs': {'a': {'anyOf': [{'$ref': '#/$defs/a'}, {'type': 'null'}]}}},
    'cyclic all of': {'anyOf': [{'type': 'null'}, {'allOf': [{'$ref': '#'}, {'type': 'integer'}]}]},
    'doubling references': {'$ref': '#/$defs/d0', '$defs': {
        **{f'd{i}': {'allOf': [{'$ref': f'#/$defs/d{i + 1}'}] * 2} for i in range(25)}, 'd25': {'type': 'null'}}},
    'doubling objects': {'$ref': '#/$defs/d0', '$defs': {
        **{f'd{i}': {'type': 'object', 'properties': {'a': {'$ref': f'#/$defs/d{i + 1}'},
        'b': {'$ref': f'#/$defs/d{i + 1}'}}}
           for i in range(25)}, 'd25': {'type': 'null'}}},
    'product of alternatives': {'allOf': [{'anyOf': [
        {'type': 'object', 'properties': {f'{i}{j}': {'type': 'integer'}}, 'required': [f'{i}{j}']} for j in range(9)]}
        for i in range(9)]},
    'ambiguous recursion': {'$ref': '#/$defs/a', '$defs': {'a': {'anyOf': [
        {'type': 'array', 'items': {'$ref': '#/$defs/a'}}, {'type': 'array', 'items': {'$ref': '#/$defs/a'}},
        {'type': 'null'}]}}},
    'wide': WIDE,
    'wide and required': {**WIDE, 'required': list(WIDE['properties'])[:90]},
    'huge counts': {'type': 'array', 'minItems': 10**6, 'maxItems': 10**6, 'items': {'type': 'string',
    'minLength': 10**6}},
    'counts within counts': {'type': 'array', 'minItems': 10**6, 'items': {'type': 'array', 'minItems': 10**6,
    'items': {
        'type': 'array', 'minItems': 10**6}}},
    'counts beyond': {'type': 'array', 'maxItems': 10**18},
    'multiple of a prime': {'type': 'integer', 'multipleOf': 99_999_989},
    'multiple of 9973': {'type': 'integer', 'multipleOf': 9973},
    'multiples': {'allOf': [{'type': 'integer', 'multipleOf': n} for n in (9973, 9967, 9949)]},
    'tiny multiple': {'type': 'number', 'multipleOf': 1e-300},
    'huge bound': {'type': 'number', 'minimum': 1e308},
    'tiny bound': {'type': 'number', 'minimum': 5e-324},
    'narrow bounds': {'type': 'number', 'minimum': 0.1234567890123456, 'maximum': 0.1234567890123457},
    'options of the library': {'x-guidance': {'lenient': True}, 'type': 'string', 'format': 'secret'},
    'all of long patterns': patterns(*(f'^[a-z]{{{n},1000}}$' for n in range(500, 516))),
    'all of dots': patterns(*(f'{c}.*{c}.*{c}' for c in 'abcdefghij')),
    'pattern and length': {'type': 'string', 'pattern': 'a.*b.*c.*d.*e.*f.*g', 'minLength': 1000, 'maxLength': 10**6},
    'overlapping pattern properties': {'patternProperties': {f'^.*{c}.*$': {'type': 'null'} for c in 'abcdefgh'}},
    'many patterns of one kind': {'type': 'object', 'patternProperties': {f'^k{i}.{{20}}$': True for i in range(99)}},
}
REGEXES = [
    '((a*)*)*', '(a*)*b', '(a|a)*b', '(a|aa)+$', '(.*a.{20})', '.*a.{900}', '(x+x+)+y', '(?<=x)', '^+', 'a{99999}',
    'a{1000}', '(a{1000}){1000}',
    '((a{1000}){1000}){1000}', '(([a-z]{1,99}x){1,99}y){1,2}', '(' * 60_000 + 'a' + ')' * 60_000,
    '(' * 32 + 'a' + ')*' * 32, '[' * 1000,
    r'\p{L}{1,1000}', r'(\p{L}|\p{N}|.){1,900}x', '(a?){1000}a{1000}', '|'.join(f'x{i}' for i in range(100)),
    '(' + '|' * 500 + ')',
    '(.{0,900}a){9}', '[^a]{999}b.*', '(ab|a|b){0,999}c(ab|a|b){0,999}', '\x00', '', r'(a)\1',
    '(?P<' + 'n' * 400 + '>a)', r'\x{110000}', '🙂{999}',
]


@pytest.fixture(scope='module')
def compiler(tokenizer):
    compiler = Compiler(tokenizer, VOCAB, sandbox=Sandbox())
    compiler.compile(Source('regex', 'warm'))
    yield compiler
    compiler.close()


def answered(compiler, form, stops):
    """An error, or a grammar of which a few steps work; within time."""
    start = time.perf_counter()
    try:
        compiled = compiler.compile(read_format(form))
    except RequestError as error:
        assert error.code[:6] == 'LMD-32'
        assert len(str(error)) < 600
    else:
        matcher, mask = compiled.matcher(stops), np.zeros(-(-VOCAB // 32), np.uint32)
        for step in range(50):
            matcher.fill(mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder='little'))
            token = int(allowed[(7 * step) % len(allowed)]) if len(allowed) else stops[0]
            if token in stops:
                break
            matcher.accept(token)
    assert time.perf_counter() - start < SECONDS


@pytest.mark.parametrize('name', SCHEMAS)
def test_schemas_made_to_hurt(name, compiler, tokenizer):
    answered(compiler, {'type': 'json_schema', 'json_schema': {'schema': SCHEMAS[name]}},
    tuple(tokenizer.eos_token_ids))


@pytest.mark.parametrize('pattern', REGEXES, ids=lambda pattern: ascii(pattern[:30]))
def test_regular_expressions_made_to_hurt(pattern, compiler, tokenizer):
    answered(compiler, {'type': 'regex_schema', 'regex_schema': pattern}, tuple(tokenizer.eos_token_ids))
    answered(compiler, {'type': 'json_schema', 'json_schema': {'type': 'string', 'pattern': pattern}},
    tuple(tokenizer.eos_token_ids))


HANGS = Source('json', '{"type":"integer","multipleOf":99999989}')
CRASHES = Source('json', '{"anyOf":[' * 20_000 + 'true' + ']}' * 20_000)
EATS = Source('regex', '(((a{1000}){1000}){1000}){1000}')


@pytest.mark.parametrize('source', [HANGS, CRASHES, EATS], ids=['hangs', 'crashes', 'eats'])
def test_what_passes_the_checks_by_mistake_harms_the_sandbox_only(source):
    sandbox = Sandbox()
    sandbox.check(Source('json', '{}'))
    start = time.perf_counter()
    with pytest.raises(RequestError) as caught:
        sandbox.check(source)
    assert caught.value.code in ('LMD-325', 'LMD-326')
    assert time.perf_counter() - start < SECONDS
    sandbox.check(Source('json', '{}'))
    sandbox.close()


def test_a_sandbox_of_which_the_idle_process_ended_starts_another():
    sandbox = Sandbox()
    sandbox.check(Source('json', '{}'))
    process = sandbox._idle[0]._child
    process.kill()
    process.wait()
    sandbox.check(Source('regex', 'abc'))
    with pytest.raises(RequestError) as caught:
        sandbox.check(Source('regex', '[a'))
    assert caught.value.code == 'LMD-325'
    child = sandbox._idle[0]._child
    sandbox.close()
    assert child.poll() is not None


def test_a_closed_input_ends_the_process():
    sandbox = Sandbox()
    sandbox.check(Source('json', '{}'))
    child = sandbox._idle[0]._child
    child.stdin.close()
    assert child.wait(10) == 0
    sandbox.close()

"""Answers under a grammar: whatever the model would say, what it finishes is valid, however the engine runs."""

from __future__ import annotations

import json
import re

import pytest

from lmdeploy.grammar.formats import read_format, regex_source, schema_source
from lmdeploy.grammar.tools import named_call, required_calls
from tests.grammar.schemas import DIGIT, SCHEMAS, WORD, closed

jsonschema = pytest.importorskip('jsonschema')
pytest.importorskip('llguidance')

PROMPTS = [[i, 7 * i + 3, 40] for i in range(12)]


def finished(tokenizer, results):
    texts = [tokenizer.decode(tokens) for tokens, finish in results if finish.reason == 'stop']
    assert all(finish.reason in ('stop', 'length') for _, finish in results)
    return texts


@pytest.mark.parametrize('name', SCHEMAS)
def test_finished_answers_are_instances_of_the_schema(name, tokenizer, answers):
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    texts = finished(tokenizer, answers(schema_source(schema), PROMPTS, depth=2))
    assert len(texts) >= len(PROMPTS) // 3
    for text in texts:
        validator.validate(json.loads(text))


def test_a_json_object_is_an_object(tokenizer, answers):
    texts = finished(tokenizer, answers(read_format({'type': 'json_object'}), [[i, i] for i in range(40)], slots=16))
    assert texts
    assert all(isinstance(json.loads(text), dict) for text in texts)


REGEXES = [
    '', 'abc', 'a*', '[a-c]{2,5}', r'\d{3}-\d{4}', '(yes|no|maybe)', r'[A-Z]\w{0,3}\.', '你(好|们){1,2}!',
    '(?i)hello', '(?s)a.b',
    r'[^a-z]{3}', r'\$\d+\.\d{2}', r'(?:(?P<x>a)|b)?c', 'a+?b', r'"[^"\\]{0,4}"', r'\s{2}x', '^abc$', r'/\*x\*/',
    r'[\]\[\-x]{3}',
    r'\x41\u4f60', '[一-龥]{2}', r'\p{Lu}{2}', r'[\d\w]{4}', r'\W\D\S', '🙂{2}', 'a{0}b', '(ab{2}){2}', r'#\t\n',
]


@pytest.mark.parametrize('pattern', REGEXES)
def test_finished_answers_match_the_whole_regular_expression(pattern, tokenizer, answers):
    texts = finished(tokenizer, answers(regex_source(pattern), PROMPTS, new=100, depth=2))
    assert texts
    for text in texts:
        if r'\p' in pattern:
            assert len(text) == 2 and text.isupper()
        else:
            assert re.fullmatch(pattern, text), text


TOOLS = [
    {'type': 'function', 'function': {'name': 'weather', 'parameters': {
        **closed(['city'], city=WORD, days={'$ref': '#/$defs/days'}), '$defs': {'days': DIGIT}}}},
    {'type': 'function', 'function': {'name': 'now', 'description': 'The time.'}},
    {'type': 'function', 'function': {'name': '搜索', 'parameters': {'$ref': '#/$defs/q',
    '$defs': {'q': closed(query=WORD)}}}},
]


def test_forced_calls_name_a_tool_and_fit_its_parameters(tokenizer, answers):
    parameters = {tool['function']['name']: tool['function'].get('parameters', closed()) for tool in TOOLS}
    seen = set()
    for text in finished(tokenizer, answers(read_format(required_calls(TOOLS)), [[i, i] for i in range(30)])):
        calls = json.loads(text)
        assert calls
        for call in calls:
            assert call.keys() == {'name', 'parameters'}
            jsonschema.validate(call['parameters'], parameters[call['name']])
            seen.add(call['name'])
    assert seen == parameters.keys()


def test_calls_that_are_not_parallel_are_one(tokenizer, answers):
    texts = finished(tokenizer, answers(read_format(required_calls(TOOLS, parallel=False)), PROMPTS))
    assert texts
    assert all(len(json.loads(text)) == 1 for text in texts)


def test_a_named_call_is_its_parameters_alone(tokenizer, answers):
    texts = finished(tokenizer, answers(read_format(named_call(TOOLS, 'weather')), PROMPTS))
    assert texts
    for text in texts:
        jsonschema.validate(json.loads(text), TOOLS[0]['function']['parameters'])


@pytest.mark.parametrize('name', ['person', 'deep list', 'tree', 'unicode enum'])
def test_overlap_and_preemption_change_nothing(name, answers):
    source = schema_source(SCHEMAS[name])
    alone = [answers(source, [prompt])[0] for prompt in PROMPTS]
    assert answers(source, PROMPTS, depth=2) == alone
    squeezed = answers(source, PROMPTS, depth=2, blocks=32, slots=12)
    assert squeezed == alone


def test_preempted_answers_continue_where_they_were(answers):
    source = schema_source({'type': 'string', 'minLength': 60, 'maxLength': 60})
    alone = [answers(source, [prompt])[0] for prompt in PROMPTS[:6]]
    assert answers(source, PROMPTS[:6], depth=2, blocks=16) == alone
    assert answers.preemptions > 0

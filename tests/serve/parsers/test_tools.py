"""Tool calls: found in well-formed answers, and nothing lost of others, however the text is cut."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.serve.parsers import NamedCall, RequiredCalls, collect, tool_parser
from lmdeploy.serve.parsers.base import MAX_SPACE, CallArguments, Content
from lmdeploy.serve.parsers.tools.call import MAX_ARGUMENTS, MAX_ENVELOPE, MAX_NAME
from tests.serve.parsers.answers import (
    EXAMPLES,
    OFFERED,
    PARSERS,
    answers,
    check_grammar,
    cut,
    ids,
    mutate,
    new_parser,
    objects,
    one_shot,
    read,
    source,
)


def parse(name: str, text: str):
    """The answer as a whole, after the laws have been checked on the way."""
    events = one_shot(new_parser(name), text)
    check_grammar(events)
    assert source(events) == text
    return collect(events)


def calls(name: str, text: str) -> list[tuple[str, str]]:
    answer = parse(name, text)
    assert all(call.complete for call in answer.calls)
    return [(call.name, call.arguments) for call in answer.calls]


WIDE = ' ' * (MAX_SPACE + 1)


# Well-formed answers.

@pytest.mark.parametrize('form', ['qwen', 'internlm', 'llama3'])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_well_formed_answers(form, data):
    text, content, found = data.draw(answers(form))
    answer = parse(form, text)
    assert [(call.name, call.arguments) for call in answer.calls] == found
    assert all(call.complete for call in answer.calls)
    assert (answer.content or '').replace(' ', '') == (content or '').replace(' ', '')
    at = data.draw(st.lists(st.integers(0, len(text))))
    whole = one_shot(new_parser(form), text)
    assert read(new_parser(form), cut(text, at)) == read(new_parser(form), list(text)) == whole


@settings(max_examples=60, deadline=None)
@given(st.lists(objects('parameters') | objects('arguments'), min_size=1, max_size=3), st.data())
def test_required_calls(found, data):
    text = '[' + ', '.join(whole for _, _, whole in found) + ']'
    assert calls('required', text) == [(name, body) for name, body, _ in found]
    assert parse('required', text).content is None
    at = data.draw(st.lists(st.integers(0, len(text))))
    assert read(new_parser('required'), cut(text, at)) == one_shot(new_parser('required'), text)


@settings(max_examples=40, deadline=None)
@given(objects('arguments'), st.data())
def test_a_named_call(found, data):
    _, body, _ = found
    text = f' {body}\n'
    assert calls('named', text) == [('f', body)]
    at = data.draw(st.lists(st.integers(0, len(text))))
    assert read(new_parser('named'), cut(text, at)) == one_shot(new_parser('named'), text)


@pytest.mark.parametrize('form, text, content, found', [
    ('qwen', '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', None, [('f', '{"a": 1}')]),
    ('qwen', 'A\n\n<tool_call>{"name":"f","arguments":{}}</tool_call>\n\nB', 'A\n\nB', [('f', '{}')]),
    ('qwen', '<tool_call>{"name":"f"}</tool_call>', None, [('f', '{}')]),
    ('qwen', '<tool_call>{"name":"f","arguments":null}</tool_call>', None, [('f', '{}')]),
    ('qwen', '<tool_call>{"name":"f","arguments":{}}', None, [('f', '{}')]),  # the last token is not in the text
    ('qwen', '<tool_call>{"name":"f","arguments":{}}\n</tool_', '\n</tool_', [('f', '{}')]),
    ('qwen', '<tool_call>{"name":"f","arguments":{}\n</tool_call>', None, [('f', '{}')]),  # a brace is missing
    ('qwen', '<tool_call>{"arguments":{"a":[1]},"name":"f"}</tool_call>', None, [('f', '{"a":[1]}')]),
    ('qwen', '<tool_call>{"name":"any","arguments":{}}</tool_call>', None, [('any', '{}')]),
    ('qwen', '<tool_call>{"na\\u006de":"\\u0066","arguments":{}}</tool_call>', None, [('f', '{}')]),
    ('qwen', '<tool_call>{"name":"f","arguments":{"a":"</tool_call>"}}</tool_call>', None,
     [('f', '{"a":"</tool_call>"}')]),
    ('qwen', '<tool_call>{"name":"f","arguments":{}}<tool_call>{"name":"g","arguments":{}}', None,
     [('f', '{}'), ('g', '{}')]),
    ('qwen', '<tool_call>{"name":"f","arguments":{}}\n{"name":"g","arguments":{}}</tool_call>', None,
     [('f', '{}'), ('g', '{}')]),
    ('qwen', '<tool_call><tool_call>{"name":"f","arguments":{}}</tool_call>', '<tool_call>', [('f', '{}')]),
    ('qwen', '<<tool_call>{"name":"f","arguments":{}}</tool_call>', '<', [('f', '{}')]),
    ('qwen', '{"name": "f", "arguments": {"a": 1}}', None, [('f', '{"a": 1}')]),
    ('qwen', '\n{"name": "f", "arguments": {}}\n{"name": "f", "arguments": {}}', None, [('f', '{}'), ('f', '{}')]),
    ('qwen', '```json\n{"name": "f", "arguments": {}}\n```', None, [('f', '{}')]),
    ('qwen', '```json\n{"name": "f", "arguments": {}}\n```\nRun it.', '\nRun it.', [('f', '{}')]),
    ('qwen', '\n```json\n{"name": "f", "arguments": {}} \n ```', None, [('f', '{}')]),
    ('qwen', '\n```json\n{"name": "f", "arguments": {}}\n``x', '\n``x', [('f', '{}')]),
    ('qwen', '<tool_call>{"name": "' + 'n' * MAX_NAME + '"}', None, [('n' * MAX_NAME, '{}')]),
    ('internlm', 'a<|action_start|> <|plugin|>\n{"name":"f","parameters":{}}<|action_end|>\nb', 'a\nb', [('f', '{}')]),
    ('internlm', '<|action_start|><|plugin|>{"name":"f","arguments":{}}', None, [('f', '{}')]),
    ('llama3', '<|python_tag|>{"name":"f","parameters":{}};{"name":"f","parameters":{}}', None,
     [('f', '{}'), ('f', '{}')]),
    ('llama3', '{"type":"function","name":"f","parameters":{"a":"}"}}', None, [('f', '{"a":"}"}')]),
    ('llama3', '<function=f>{"a":1}</function>', None, [('f', '{"a":1}')]),
    ('llama3', '<function=f>\n{"a":1}', None, [('f', '{"a":1}')]),
    ('llama3', '<function=f>{"a":1}\n{"name":"f","parameters":{}}', '\n{"name":"f","parameters":{}}',
     [('f', '{"a":1}')]),
    ('llama3', WIDE + '{"name":"f","parameters":{}}' + WIDE + ';{"name":"f","parameters":{}}', WIDE + WIDE,
     [('f', '{}'), ('f', '{}')]),
    ('llama3', '<function=' + 'n' * MAX_NAME + '>{}</function>', None, [('n' * MAX_NAME, '{}')]),
    ('required', ' [ ] ', ' [ ] ', []),
    ('required', '{"name":"f","parameters":{}} ]', ' ]', [('f', '{}')]),
    ('required', '{"name":"f","parameters":{}}, {}', ', {}', [('f', '{}')]),
    ('required', '{"name":"f","parameters":{}}', None, [('f', '{}')]),
    ('required', '[{"name":"f","parameters":{}},]\n', None, [('f', '{}')]),
    ('required', '[{"name":"f","parameters":{}}, ', None, [('f', '{}')]),
    ('required', '[{"name":"f","parameters":{}}] and', '] and', [('f', '{}')]),
    ('named', '{"a":1}', None, [('f', '{"a":1}')]),
    ('named', '{"a":1} x', ' x', [('f', '{"a":1}')]),
])
def test_examples(form, text, content, found):
    assert (parse(form, text).content, calls(form, text)) == (content, found)


# Text that is no call is content, character for character.

@pytest.mark.parametrize('form, text', [
    ('qwen', 'a < b, <b>bold</b>, </tool_call>, <tool_calls>{}'),
    ('qwen', '<tool_call>'),
    ('qwen', 'x \n<tool_call>\n'),
    ('qwen', '<tool_call>{"name": "f"'),
    ('qwen', '<tool_call>{"name": "f", "arguments": '),
    ('qwen', '<tool_call>{}</tool_call>'),
    ('qwen', '<tool_call>[]</tool_call>'),
    ('qwen', '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
    ('qwen', '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ('qwen', '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    ('qwen', '<tool_call>{"name": "f", "arguments": []}</tool_call>'),
    ('qwen', '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'),
    ('qwen', '<tool_call>{"name": "f", "name": "g", "arguments": {}}</tool_call>'),
    ('qwen', '<tool_call>{"arguments": {}, "parameters": {}, "name": "f"}</tool_call>'),
    ('qwen', '<tool_call>{"arguments": {"a": tru}, "name": "f"}</tool_call>'),
    ('qwen', "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>"),
    ('qwen', '<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>'),
    ('qwen', '<tool_call>' + ' ' * (MAX_SPACE + 1) + '{"name": "f", "arguments": {}}'),
    ('qwen', '<tool_call>{"name": "' + 'n' * (MAX_NAME + 1) + '", "arguments": {}}'),
    ('qwen', '<tool_call>{"x": "' + 'n' * MAX_ENVELOPE + '", "name": "f", "arguments": {}}'),
    ('qwen', '<tool_call>{"x": ' + '[' * 100 + ']' * 100 + ', "name": "f", "arguments": {}}'),
    ('qwen', 'Text first. {"name": "f", "arguments": {}}'),
    ('qwen', '{"name": "unknown", "arguments": {}}'),
    ('qwen', '{"name": "f"}'),
    ('qwen', '{"result": 3, "name": "f", "arguments": {}}'),
    ('qwen', '```json\n{"a": 1}\n```'),
    ('qwen', '```python\nprint()\n```'),
    ('qwen', '``'),
    ('qwen', ' \n\t '),
    ('internlm', '<|action_start|><|interpreter|>\nprint(1)<|action_end|>'),
    ('internlm', '<|action_start|>x'),
    ('internlm', '<|plugin|>{"name":"f","parameters":{}}<|action_end|>'),
    ('internlm', '{"name": "f", "parameters": {}}'),
    ('llama3', '<|python_tag|>brave_search.call(query="x")'),
    ('llama3', '<function=f(x)>1</function>'),
    ('llama3', '<function=>{}</function>'),
    ('llama3', '<function=' + 'n' * (MAX_NAME + 1) + '>{}</function>'),
    ('llama3', '<function=a b>{}</function>'),
    ('required', 'I cannot.'),
    ('required', '[1, 2]'),
    ('required', '[{"name": "f"'),
    ('named', 'I cannot.'),
    ('named', '[{}]'),
])
def test_what_is_no_call_is_content(form, text):
    assert one_shot(new_parser(form), text) == read(new_parser(form), list(text)) == [Content(text)]


# A call that goes wrong after it was announced.

@pytest.mark.parametrize('form, text, given, content', [
    ('qwen', '<tool_call>{"name":"f","arguments":{"a": tru}}</tool_call>', '{"a": tru', '}}</tool_call>'),
    ('qwen', '<tool_call>{"name":"f","arguments":{"a": 1', '{"a": 1', None),
    ('qwen', '<tool_call>{"name":"f","arguments":{"a": "x\ny"}}', '{"a": "x', '\ny"}}'),
    ('llama3', '<function=f>{"a" 1}</function>', '{"a" ', '1}</function>'),
    ('required', '[{"name":"f","parameters":{"a":}}]', '{"a":', '}}]'),
    ('named', '{"a": }', '{"a": ', '}'),
])
def test_a_broken_call_ends_where_it_breaks(form, text, given, content):
    answer = parse(form, text)
    assert [(call.arguments, call.complete) for call in answer.calls] == [(given, False)]
    assert answer.content == content


def test_calls_go_on_behind_a_broken_one():
    answer = parse('qwen', '<tool_call>{"name":"f","arguments":{]}</tool_call><tool_call>{"name":"g","arguments":{}}')
    assert [(call.name, call.complete) for call in answer.calls] == [('f', False), ('g', True)]
    assert answer.content == ']}</tool_call>'


def test_arguments_too_deep():
    inner = '{"a":' * 100 + '1' + '}' * 100
    answer = parse('qwen', '<tool_call>{"name":"f","arguments":' + inner + '}</tool_call>')
    assert not answer.calls[0].complete
    assert answer.calls[0].arguments + answer.content == inner + '}</tool_call>'


@pytest.mark.parametrize('excess', [0, 1])
def test_arguments_too_long(excess):
    body = '{"a": "' + 'x' * (MAX_ARGUMENTS - 9 + excess) + '"}'
    text = '<tool_call>{"name":"f","arguments":' + body + '}</tool_call>'
    answer = parse('qwen', text)
    assert len(body) == MAX_ARGUMENTS + excess
    assert answer.calls[0].complete == (excess == 0)
    assert answer.calls[0].arguments == body[:MAX_ARGUMENTS]
    assert one_shot(new_parser('qwen'), text) == read(new_parser('qwen'), cut(text, range(0, len(text), 997)))


# Any text at all.

@pytest.mark.parametrize('form', PARSERS)
@pytest.mark.parametrize('text', EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_split_point_gives_the_same(form, text):
    whole = one_shot(new_parser(form), text)
    check_grammar(whole)
    assert source(whole) == text
    assert read(new_parser(form), list(text)) == whole
    for at in range(len(text) + 1):
        assert read(new_parser(form), [text[:at], text[at:]]) == whole


@pytest.mark.parametrize('form', PARSERS)
def test_ten_thousand_damaged_answers(form):
    rng = random.Random(f'damage {form}')
    for _ in range(10_000 // len(PARSERS)):
        text = mutate(rng.choice(EXAMPLES), rng)
        whole = one_shot(new_parser(form), text)
        check_grammar(whole)
        assert source(whole) == text
        if not collect(whole).calls:
            assert (collect(whole).content or '') == text
        at = [rng.randint(0, len(text)) for _ in range(rng.randint(1, 8))]
        assert read(new_parser(form), cut(text, at)) == whole


PARTS = st.text(max_size=4) | st.sampled_from([
    '<tool_call>', '</tool_call>', '{"name":"f","arguments":{}}', '{', '}', '<|action_start|>', '<|plugin|>',
    '<|python_tag|>', '<function=f>', ' ' * 65, '\n', ';', '"name":"f",', '"arguments":{', '```json', '```', '['])


@pytest.mark.parametrize('form', PARSERS)
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_text(form, data):
    text = ''.join(data.draw(st.lists(PARTS, max_size=12)))
    whole = one_shot(new_parser(form), text)
    check_grammar(whole)
    assert source(whole) == text
    assert read(new_parser(form), cut(text, data.draw(st.lists(st.integers(0, 200))))) == whole
    assert read(new_parser(form), list(text)) == whole


# What a client sees while the answer is written.

def test_arguments_arrive_as_they_are_written():
    parser, sizes = new_parser('qwen'), []
    parser.push('<tool_call>\n{"name": "f", "arguments": ')
    for char in '{"text": "abc"}':
        events = parser.push(char)
        sizes.append(sum(len(event.text) for event in events if isinstance(event, CallArguments)))
    assert sizes == [1] * len(sizes), 'nothing of the arguments is held back'


def test_content_is_held_back_no_longer_than_needed():
    parser = new_parser('qwen')
    assert parser.push('Hello <tool') == [Content('Hello')]
    assert parser.push('box>') == [Content(' <toolbox>')]


def test_ids_are_made_once_per_call():
    made = []
    parser = tool_parser('qwen', new_id=lambda: made.append(len(made)) or f'call-{len(made)}', names=OFFERED)
    read(parser, ['<tool_call>{"name":"f","arguments":{}}</tool_call><tool_call>{"name":"g"'])
    assert made == [0]


def test_default_ids():
    text = '[{"name":"f","parameters":{}},{"name":"f","parameters":{}}]'
    first, second = collect(one_shot(RequiredCalls(), text)).calls
    assert first.id.startswith('chatcmpl-tool-') and first.id != second.id
    assert collect(one_shot(NamedCall('f'), '{}')).calls[0].id.startswith('chatcmpl-tool-')


def test_names_need_not_be_known():
    parser = tool_parser('llama3', new_id=ids())
    assert [call.name for call in collect(one_shot(parser, '{"name":"any","parameters":{}}')).calls] == ['any']


def test_arguments_are_the_models_own_text():
    body = '{ "a" :\t1.50, "b": "\\u00e9\\/é", "b": [ ] }'
    answer = parse('qwen', '<tool_call>{"name":"f","arguments":' + body + '}</tool_call>')
    assert answer.calls[0].arguments == body
    assert json.loads(body)['b'] == []

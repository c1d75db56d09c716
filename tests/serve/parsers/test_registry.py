"""Parsers by name, and the names that templates call for."""

from __future__ import annotations

import pytest

from lmdeploy.chat.builtin import FORMATS
from lmdeploy.errors import ConfigError
from lmdeploy.serve.parsers import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    ParserNames,
    collect,
    for_template,
    reasoning_parser,
    tool_parser,
)
from lmdeploy.serve.parsers.base import Split
from lmdeploy.serve.parsers.registry import BY_TEMPLATE
from tests.chat import templates
from tests.serve.parsers.answers import one_shot

CALL = {'qwen': '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        'internlm': '<|action_start|><|plugin|>\n{"name": "f", "parameters": {}}<|action_end|>',
        'llama3': '<|python_tag|>{"name": "f", "parameters": {}}'}


@pytest.mark.parametrize('name, form', [
    ('qwen', 'qwen'), ('qwen2d5', 'qwen'), ('qwen3', 'qwen'), ('hermes', 'qwen'), ('internlm', 'internlm'),
    ('internlm2', 'internlm'), ('internlm3', 'internlm'), ('intern-s1', 'internlm'), ('llama3', 'llama3'),
    ('llama3_1', 'llama3'), ('llama3_2', 'llama3')])
def test_tool_parser_names(name, form):
    for other, text in CALL.items():
        assert len(collect(one_shot(tool_parser(name), text)).calls) == (other == form)


@pytest.mark.parametrize('name, inside', [('default', False), ('qwen3', False), ('deepseek-v3', False),
                                          ('intern-s1', False), ('deepseek-r1', True), ('qwen-qwq', True)])
def test_where_an_answer_begins(name, inside):
    def begins_inside(**more) -> bool:
        split = reasoning_parser(name, **more).push('a')
        assert split in (Split('a', ''), Split('', 'a'))
        return split.reasoning == 'a'

    assert begins_inside() == inside
    assert begins_inside(enable_thinking=True) == inside
    assert not begins_inside(enable_thinking=False)
    assert begins_inside(prompt_end='<|im_start|>assistant\n<think>\n')
    assert begins_inside(prompt_end='<think>\n', enable_thinking=False), 'the prompt is what the model has seen'
    assert not begins_inside(prompt_end='<think>\n\n</think>\n\n')
    assert not begins_inside(prompt_end='</think>', enable_thinking=True)
    assert begins_inside(prompt_end='what is <think> for?<|im_end|>\n<|im_start|>assistant\n') == inside


@pytest.mark.parametrize('make, field', [(tool_parser, 'tool_call_parser'), (reasoning_parser, 'reasoning_parser')])
def test_unknown_names(make, field):
    with pytest.raises(ConfigError, match=rf'LMD-221.*{field}=.nope.*qwen3'):
        make('nope')


def test_users_may_register_their_own():
    @TOOL_PARSERS.register_module(name='mine')
    class Mine:
        def __init__(self, new_id, names):
            self.names = names

    @REASONING_PARSERS.register_module(name='mine')
    class Mind:
        def __init__(self, inside):
            self.inside = inside

    try:
        assert tool_parser('mine', names=['f']).names == ['f']
        assert reasoning_parser('mine', prompt_end='<think>').inside is True
    finally:
        del TOOL_PARSERS.module_dict['mine'], REASONING_PARSERS.module_dict['mine']


def test_named_templates_that_render_tools_have_a_parser():
    for row in FORMATS:
        tools = bool(row.rewrite) and row.rewrite.__name__.endswith('_tools')
        for name in row.names:
            assert bool(for_template(name).tools) == tools, name


def test_named_templates_that_open_reasoning_have_a_parser():
    for row in FORMATS:
        thinks = bool(row.opener) and row.opener.__name__.startswith('think_')
        for name in row.names:
            assert bool(for_template(name).reasoning) == thinks, name


def test_the_table_names_parsers():
    for names in BY_TEMPLATE.values():
        assert names.tools is None or names.tools in TOOL_PARSERS
        assert names.reasoning is None or names.reasoning in REASONING_PARSERS


PROMPT = "{{ '<|im_start|>assistant\\n' }}"


@pytest.mark.parametrize('source, tools, reasoning', [
    (templates.QWEN25, 'qwen', None),
    (templates.QWEN3, 'qwen', 'qwen3'),
    (templates.LLAMA31, 'llama3', None),
    ('<|plugin|> name=', 'internlm', None),
    ("{{ '<|python_tag|>' + call.name }}", 'llama3', None),
    ('<tool_call>\n<function=x>\n<parameter=y>', None, None),
    ('<tool_call>{{ name }}\n<arg_key>', None, None),
    ("content.split('</think>')[-1] {{ '<｜Assistant｜><think>\\n' }}", None, 'deepseek-r1'),
    ("{% if thinking %}{{ '<｜Assistant｜><think>' }}{% else %}{{ '</think>' }}{% endif %}", None, 'deepseek-v3'),
    ("content.split('</think>')[-1] {{ '<|im_start|>assistant\\n<think>\\n' }} <tool_call>", 'qwen', 'qwen-qwq'),
    ("{{ '<think>' + m.reasoning + '</think>' }}", None, 'default'),
    (PROMPT, None, None),
])
def test_what_a_models_own_template_calls_for(source, tools, reasoning):
    assert for_template('hf', source) == ParserNames(tools, reasoning)


def test_the_own_template_goes_before_the_name():
    assert for_template('qwen3', PROMPT) == ParserNames(None, None)
    assert for_template('no such template') == ParserNames(None, None)

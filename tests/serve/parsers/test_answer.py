"""Whole answers: streamed and waited for, they are the same."""

from __future__ import annotations

import pytest

from lmdeploy.serve.parsers import (
    Answer,
    AnswerParser,
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Reasoning,
    ToolCall,
    collect,
    reasoning_parser,
)
from lmdeploy.serve.parsers.base import Frame
from tests.serve.parsers.answers import EXAMPLES, PARSERS, new_parser, read

CALLED = '<think>\nParis?\n</think>\n\nI look.\n' \
         '<tool_call>\n{"name": "f", "arguments": {"city": "Paris"}}\n</tool_call>'


def parser(reasoning: str | None = 'qwen3', tools: str | None = 'qwen') -> AnswerParser:
    return AnswerParser(reasoning and reasoning_parser(reasoning), tools and new_parser(tools))


def test_reasoning_content_and_a_call():
    events = read(parser(), [CALLED])
    assert events == [Reasoning('Paris?'), Content('I look.'), CallStart(0, 'call-0', 'f'),
                      CallArguments(0, '{"city": "Paris"}'), CallEnd(0, True)]
    assert collect(events) == Answer('Paris?', 'I look.', (ToolCall('call-0', 'f', '{"city": "Paris"}', True),))


@pytest.mark.parametrize('reasoning', [None, 'qwen3', 'deepseek-r1'])
@pytest.mark.parametrize('tools', [None, *PARSERS])
def test_every_split_point_gives_the_same(reasoning, tools):
    for text in (CALLED, *EXAMPLES):
        whole = read(parser(reasoning, tools), [text])
        assert not any(isinstance(event, Frame) for event in whole)
        assert read(parser(reasoning, tools), list(text)) == whole
        for at in range(len(text) + 1):
            assert read(parser(reasoning, tools), [text[:at], text[at:]]) == whole


def test_calls_inside_the_reasoning_are_reasoning():
    text = '<think><tool_call>{"name":"f","arguments":{}}</tool_call></think>no'
    assert collect(read(parser(), [text])) == Answer('<tool_call>{"name":"f","arguments":{}}</tool_call>', 'no', ())


def test_without_parsers_everything_is_content():
    assert read(AnswerParser(), list(CALLED)) == [Content(CALLED)]


def test_calls_are_counted_as_they_begin():
    counted, counts = parser(), []
    for piece in ('a<tool_call>{"name":"f",', '"arguments":{', '}}</tool_call><tool_call>{"name":"f"}', ''):
        counted.push(piece)
        counts.append(counted.calls)
    assert counts == [0, 1, 2, 2]


def test_what_is_held_in_the_reasoning_reaches_the_tools():
    """An answer that ends within a tag."""
    assert read(parser(), ['<thin']) == [Content('<thin')]
    assert read(parser(), ['<think>a</thin']) == [Reasoning('a</thin')]


def test_a_call_that_breaks_off():
    answer = collect(read(parser(), ['<tool_call>{"name":"f","arguments":{"a": "x']))
    assert answer == Answer(None, None, (ToolCall('call-0', 'f', '{"a": "x', False),))


def test_an_empty_answer():
    assert collect(read(parser(), [''])) == Answer(None, None, ())

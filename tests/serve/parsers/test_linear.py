"""Parsing costs in proportion to the text: ten times the text, about ten times the work, in the worst answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest

from lmdeploy.serve.parsers.base import MAX_SPACE
from lmdeploy.serve.parsers.reasoning.think import ThinkParser
from tests.serve.parsers.answers import PARSERS, cut, new_parser

CALL = '<tool_call>{"name":"f","arguments":'
WORST: dict[str, Callable[[int], str]] = {  # of about n characters
    'prose': lambda n: 'some words, and more. ' * (n // 22),
    'space': lambda n: ' \n' * (n // 2),
    'half_space': lambda n: (' ' * MAX_SPACE + 'x') * (n // (MAX_SPACE + 1)),
    'angles': lambda n: '<' * n,
    'half_markers': lambda n: '<tool_cal' * (n // 9),
    'markers': lambda n: '<tool_call>' * (n // 11),
    'both_markers': lambda n: '<|action_start|> <|python_tag|>' * (n // 31),
    'calls': lambda n: (CALL + '{}}</tool_call>\n') * (n // 51),
    'broken_calls': lambda n: (CALL + '[') * (n // 36),
    'nameless': lambda n: '<tool_call>{"arguments":{"a":"' + 'x' * n,
    'arguments': lambda n: CALL + '{"a":"' + 'x' * n,
    'escapes': lambda n: CALL + '{"a":"' + '\\n\\"' * (n // 4),
    'quotes': lambda n: CALL + '{' + '"":"",' * (n // 6),
    'numbers': lambda n: CALL + '{"a":' + '1' * n,
    'brackets': lambda n: '[' * n,
    'braces': lambda n: '{' * n,
    'listed': lambda n: '[' + '{"name":"f","arguments":{}},' * (n // 28),
    'thought': lambda n: '<think>' + '</thin ' * (n // 7),
}
SMALL, LARGE = 20_000, 200_000


def parsers():
    return [*(new_parser(form) for form in PARSERS), ThinkParser(), ThinkParser(inside=True)]


def feed(pieces: list[str]) -> None:
    for parser in parsers():
        for piece in pieces:
            parser.push(piece)
        parser.flush()


def lines_run(work: Callable[[], None]) -> int:
    """How many lines of Python ``work`` runs."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == 'line'
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize('kind', WORST)
def test_work_is_in_proportion(kind):
    """Counted, so that a busy machine does not matter."""
    small, large = (lines_run(lambda n=n: feed([WORST[kind](n)])) for n in (SMALL // 10, LARGE // 10))
    assert large <= 12 * small
    assert large <= 30 * LARGE // 10 * len(parsers()), 'lines for each character'


def seconds(parser_names: tuple[str, ...], pieces: list[str]) -> float:
    """Of this process alone."""
    parsers = [*(new_parser(name) for name in parser_names), ThinkParser(inside=True)]
    begin = time.process_time()
    for parser in parsers:
        for piece in pieces:
            parser.push(piece)
        parser.flush()
    return time.process_time() - begin


@pytest.mark.parametrize('size', [1_000_000, 7])
@pytest.mark.parametrize('kind', WORST)
def test_time_is_in_proportion(kind, size):
    """Copying and searching inside the interpreter are not lines; quadratic work would take a hundred times as long."""
    small, large = (cut(WORST[kind](n), range(0, n, size)) for n in (SMALL, LARGE))
    names = ('required',) if kind == 'listed' else ('qwen',)
    limit = 30 * max(min(seconds(names, small) for _ in range(3)), 0.005)
    assert any(seconds(names, large) <= limit for _ in range(3))

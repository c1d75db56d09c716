"""Reasoning is parted from content as the definition says, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.serve.parsers.base import MAX_SPACE, Split
from lmdeploy.serve.parsers.reasoning.think import ThinkParser
from tests.serve.parsers.answers import cut

SPACE = ' \t\r\n'


def trimmed(text: str) -> str:
    """Without the whitespace at its end, unless there is too much of it."""
    short = text.rstrip(SPACE)
    return short if len(text) - len(short) <= MAX_SPACE else text


def definition(text: str, inside: bool) -> Split:
    """What belongs where, in terms of the whole answer."""
    start = text.lstrip(SPACE)
    opened = start.startswith('<think>') and len(text) - len(start) <= MAX_SPACE
    if not opened and not inside:
        return Split('', text)
    if opened or text.lstrip('\r\n').startswith('<think>'):
        text = start.removeprefix('<think>')
    reasoning, close, content = text.partition('</think>')
    if close:
        reasoning = trimmed(reasoning)
    return Split(reasoning.lstrip('\r\n'), content.lstrip('\r\n'))


def read(pieces: list[str], inside: bool) -> Split:
    parser = ThinkParser(inside)
    splits = [parser.push(piece) for piece in pieces] + [parser.flush()]
    return Split(''.join(split.reasoning for split in splits), ''.join(split.content for split in splits))


pieces = st.lists(st.sampled_from(['<think>', '</think>', '<', '</thi', 'a', 'é漢😀', ' ', '\n', '\n\n', '\t', '>', '/',
                                   ' ' * 64, '\n' * 65]) | st.text(max_size=3), max_size=10)


@settings(max_examples=500, deadline=None)
@given(pieces, st.booleans(), st.lists(st.integers(0, 200)))
def test_any_text(parts, inside, at):
    text = ''.join(parts)
    assert read([text], inside) == definition(text, inside)
    assert read(cut(text, at), inside) == definition(text, inside)
    assert read(list(text), inside) == definition(text, inside)


@pytest.mark.parametrize('text, inside, reasoning, content', [
    ('<think>\nhm\n</think>\n\nyes', False, 'hm', 'yes'),
    ('\n<think>\nhm\n</think>\n\nyes', False, 'hm', 'yes'),
    ('hm\n</think>\n\nyes', True, 'hm', 'yes'),
    ('<think>\nhm\n</think>\n\nyes', True, 'hm', 'yes'),
    ('<think>\n\n</think>\n\nyes', False, '', 'yes'),
    ('\n\n</think>\n\nyes', True, '', 'yes'),
    ('yes', False, '', 'yes'),
    ('\n yes ', False, '', '\n yes '),
    ('never closed\n', True, 'never closed\n', ''),
    ('<think>never closed </thin', False, 'never closed </thin', ''),
    ('<thin', False, '', '<thin'),
    ('', True, '', ''),
    ('the <think> tag', False, '', 'the <think> tag'),
    ('</think> alone', False, '', '</think> alone'),
    ('a <think> b</think> c </think> d', True, 'a <think> b', ' c </think> d'),
    ('<think>a</think><think>b</think>', False, 'a', '<think>b</think>'),
    ('<think>a < b, <b>x</b></think>    code', False, 'a < b, <b>x</b>', '    code'),
])
def test_examples(text, inside, reasoning, content):
    for at in range(len(text) + 1):
        assert read([text[:at], text[at:]], inside) == Split(reasoning, content)


def test_reasoning_arrives_as_it_is_written():
    parser = ThinkParser(inside=True)
    assert [parser.push(char).reasoning for char in 'ab c'] == ['a', 'b', '', ' c']

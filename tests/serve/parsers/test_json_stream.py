"""The scanner ends where the standard library says that a value ends."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.serve.parsers.json_stream import MAX_DEPTH, JsonScanner
from tests.serve.parsers.answers import cut, mutate, values


def refuse(constant: str) -> None:
    raise ValueError(constant)


DECODER = json.JSONDecoder(parse_constant=refuse)


def scan(pieces: list[str]) -> tuple[bool, int]:
    """(the value is whole, characters read)."""
    scanner, read = JsonScanner(), 0
    for piece in pieces:
        stop = scanner.feed(piece, 0, len(piece))
        read += stop
        if stop < len(piece):
            break
    return scanner.close(), read


def expected(text: str) -> int | None:
    """Where the first value ends; None if there is none."""
    start = len(text) - len(text.lstrip(' \t\r\n'))
    try:
        return DECODER.raw_decode(text, start)[1]
    except ValueError:
        return None


@settings(max_examples=200, deadline=None)
@given(values, st.booleans(), st.sampled_from(['', ' ', ' x', '}', ',', '"']), st.lists(st.integers(0, 60)))
def test_values(value, escape, rest, at):
    text = ' ' + json.dumps(value, ensure_ascii=escape)
    assert scan(cut(text + rest, at)) == (True, len(text))


@settings(max_examples=400, deadline=None)
@given(values, st.randoms(use_true_random=False), st.lists(st.integers(0, 60)))
def test_damaged_values(value, rng, at):
    text = mutate(json.dumps(value), rng)
    whole, read = scan(cut(text, at))
    end = expected(text)
    if end is None:
        assert not whole or text[read - 1] in '0123456789'  # '1.' and '1e' begin with a number for the library alone
    elif whole:
        assert read == end
    else:
        assert text[end:end + 1] in ('.', 'e', 'E')  # the library stops in front of '.x'; a broken number is no number
    assert scan(list(text)) == (whole, read)


@pytest.mark.parametrize('text', [
    '{', '[', '"', '"\\', '"\\u12', '-', '1.', '1e', '1e+', 'tru', '{"a"', '{"a":', '{"a":1', '{"a":1,', '[1,',
    '{,}', '[,]', '[1,]', '{"a":1,}', '{1:2}', "{'a':1}", '1x', '+1', '.5', 'NaN', 'Infinity', 'True',
    '"\n"', '"\x00"', '"\\x"', '"\\u12g4"', '[1 2]', '{"a" 1}', '{"a":1 "b":2}', ']', '}', '', '  ', '١'])
def test_no_value(text):
    whole, read = scan([text])
    assert not whole or read < len(text)


@pytest.mark.parametrize('text', [
    '0', '-0', '10', '1.5', '-1.5e-3', '1E+9', 'true', 'false', 'null', '""', '"\\u00e9\\n\\/"', '[]', '{}', '[[],{}]',
    '{"": [1, -2, "x", null, {"a": true}]}', '"\ud800"', '"\x7f\u2028"'])
def test_whole_values(text):
    assert scan([text]) == scan(list(text)) == (True, len(text))


def test_zero_begins_no_longer_number():
    assert scan(['01']) == (True, 1)


@pytest.mark.parametrize('opening, closing', ['[]', ('{"a":', '}')])
def test_depth(opening, closing):
    inner = '0' if opening != '[' else ''
    deepest = opening * MAX_DEPTH + inner + closing * MAX_DEPTH
    assert scan([deepest]) == (True, len(deepest))
    too_deep = opening * (MAX_DEPTH + 1)
    assert scan([too_deep]) == (False, len(opening) * MAX_DEPTH), 'it ends in front of the bracket that is too much'


def test_a_bomb_costs_nothing():
    assert scan(['[' * 1_000_000]) == (False, MAX_DEPTH)

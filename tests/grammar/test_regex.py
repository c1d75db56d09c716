"""Regular expressions: the common subset of the dialects, of a bounded size."""

from __future__ import annotations

import re
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.errors import RequestError
from lmdeploy.grammar.automata import build, byte_vocabulary
from lmdeploy.grammar.limits import MAX_EXPANDED, MAX_GROUPS, MAX_PATTERN, MAX_REPEAT, Budget
from lmdeploy.grammar.regex import scan


def cost(pattern):
    budget = Budget()
    scan(pattern, budget, translate=True)
    return MAX_EXPANDED - budget.expanded


@pytest.mark.parametrize('pattern, translated', [
    (r'\d', '[0-9]'), (r'[\d.]', '[0-9.]'), (r'\w', r'[\p{L}\p{N}_]'), (r'[^\w]', r'[^\p{L}\p{N}_]'), (r'\\d',
    r'\\d'), (r'[\\d]', r'[\\d]'),
    (r'\D\s\.', r'\D\s\.'), (r'\x41\u4f60\u{1F642}', r'\x41\u4f60\u{1F642}'), ('(?P<a>x)', '(?P<a>x)'), ('(?i)x',
    '(?i)x'),
])
def test_digits_are_ascii_and_words_are_letters(pattern, translated):
    assert scan(pattern, Budget(), translate=True) == translated
    assert scan(pattern, Budget(), translate=False) == pattern


@pytest.mark.parametrize('pattern, size', [
    ('', 0), ('abc', 3), ('a{5}', 5), ('a{2,5}', 5), ('a{2,}', 3), ('a*b+c?', 3), ('(ab){3}', 6),
    ('((a{10}){10}){10}', 1000), ('[a-z]{7}', 7),
    ('a|b|c', 3), ('(a|b){4}', 8), (r'\d{4}', 4), ('(a{2}b{3}){4}', 20), ('^abc$', 3), ('()', 1), ('a{0}', 1),
    ('a{3}?', 3),
])
def test_the_size_counts_repetitions_written_out(pattern, size):
    assert cost(pattern) == size


@pytest.mark.parametrize('pattern', [
    '(?=a)', '(?!a)', '(?<=a)b', '(?<!a)b', r'(a)\1', r'\bword\b', r'a\B', r'a\Z', '(?P=a)', '(?#x)', '(?>a)',
    '(?x)a', '(?m)a', 'a(?i)b',
    '(?(1)a|b)', '*a', '+', '?', '^+', '(|*)', 'a**', 'a++', 'a*+', 'a{2}{3}', 'a{2}+', '{', 'a{', 'a{,3}', 'a{x}',
    'a{2,1}', 'a{-1}', 'a{١}',
    '(', ')', '(a', 'a)', '[', '[a', '[]', '[]a]', '[^]', '[[:alpha:]]', '[a&&b]', '[a--b]', '[a~~b]', '[[a]]',
    '\\', '[\\', r'\p{L', r'\x4',
    r'\xgg', r'\u12', r'\k<a>', r'\0', r'\c', '(?P<a', '(?',
])
def test_what_dialects_read_differently_or_automata_cannot_do_is_refused(pattern):
    with pytest.raises(RequestError) as caught:
        cost(pattern)
    assert caught.value.code == 'LMD-324'


def test_each_limit_is_where_it_says():
    for pattern in ('a' * MAX_PATTERN, f'a{{{MAX_REPEAT}}}', '(' * MAX_GROUPS + 'a' + ')' * MAX_GROUPS,
            '(a{1000}){20}'):
        cost(pattern)
    for pattern in ('a' * (MAX_PATTERN + 1), f'a{{{MAX_REPEAT + 1}}}',
            '(' * (MAX_GROUPS + 1) + 'a' + ')' * (MAX_GROUPS + 1), '(a{1000}){21}',
                    'a{99999}', 'a{1,99999}', 'a{9999999999999999999999}', '((a{1000}){1000}){1000}', '(' * 60_000):
        with pytest.raises(RequestError) as caught:
            cost(pattern)
        assert caught.value.code == 'LMD-321'


def walk(matcher):
    """A text that the automaton matches; None if it has not ended after 40 bytes."""
    text = b''
    while len(text) < 40:
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder='little'))
        byte = int(allowed[zlib.crc32(text) % len(allowed)])
        if byte == 256:
            return text.decode()
        text += bytes([byte])
        assert matcher.consume_token(byte)
    return None


@settings(max_examples=400, deadline=None)
@given(st.text(st.sampled_from('ab(|)*+?{}[]^$.\\d1,0<>P:!=-&~ é'), max_size=24))
def test_any_text_is_refused_or_compiles_or_says_why_not(pattern):
    pytest.importorskip('llguidance')
    try:
        translated = scan(pattern, Budget(), translate=True)
        start = time.perf_counter()
        matcher = build(byte_vocabulary(), 'regex', translated)
    except RequestError as error:
        assert error.code in ('LMD-321', 'LMD-324', 'LMD-325')
    else:
        assert time.perf_counter() - start < 2
        text = walk(matcher)
        if text is not None:
            assert re.fullmatch(pattern, text)

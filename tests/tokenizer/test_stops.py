"""Stop strings: the same cut for every chunking, and no part of a stop string is ever shown."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmdeploy.errors import RequestError
from lmdeploy.tokenizer.stops import StopFilter

LETTERS = st.text(st.sampled_from('ab\n中'), max_size=30)
STOPS = st.lists(st.text(st.sampled_from('ab\n中'), min_size=1, max_size=6), max_size=4)


def cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition, slowly: the first place where a stop string is complete, and the longest that ends there."""
    for end in range(1, len(text) + 1):
        found = max((stop for stop in stops if text[:end].endswith(stop)), key=len, default=None)
        if found is not None:
            return text[:end] if include else text[:end - len(found)], found
    return text, None


def stream(text: str, stops: list[str], include: bool, sizes: list[int]) -> tuple[str, str | None, list[str]]:
    stop_filter, shown, pos, matched = StopFilter(stops, include), [], 0, None
    for size in [*sizes, len(text)]:
        piece, matched = stop_filter.push(text[pos:pos + size])
        shown.append(piece)
        pos += size
    shown.append(stop_filter.flush())
    return ''.join(shown), matched, shown


@given(LETTERS, STOPS, st.booleans(), st.lists(st.integers(0, 5), max_size=12))
@example('abcab', ['b', 'abc'], False, [1, 1, 1, 1, 1])
@example('aab', ['aab', 'ab'], False, [2])
@example('aaab', ['aab'], True, [1, 1])
def test_streaming_gives_what_the_whole_text_gives(text, stops, include, sizes):
    shown, matched, _ = stream(text, stops, include, sizes)
    assert (shown, matched) == cut(text, stops, include)


@given(LETTERS, STOPS, st.lists(st.integers(0, 5), max_size=12))
def test_nothing_is_held_back_without_need(text, stops, sizes):
    """What is held is the longest end of the text that begins a stop string, no more."""
    stop_filter, seen, shown, pos = StopFilter(stops), '', '', 0
    for size in sizes:
        piece, matched = stop_filter.push(text[pos:pos + size])
        seen, shown, pos = seen + text[pos:pos + size], shown + piece, pos + size
        if matched is not None:
            return
        held = next(seen[i:] for i in range(len(seen) + 1) if any(stop.startswith(seen[i:]) for stop in [*stops, '']))
        assert seen == shown + held


def test_the_string_that_is_complete_first_ends_the_text():
    assert StopFilter(['b', 'abc']).push('xabc') == ('xa', 'b')
    assert StopFilter(['bc', 'abc']).push('xabc') == ('x', 'abc')
    assert StopFilter(['User:'], include=True).push('hi User: x') == ('hi User:', 'User:')


def test_nothing_comes_after_the_end():
    stop_filter = StopFilter(['END'])
    assert stop_filter.push('a E') == ('a ', None)
    assert stop_filter.push('ND b') == ('', 'END')
    assert stop_filter.push('more') == ('', 'END')
    assert stop_filter.flush() == ''


def test_no_stop_strings_let_everything_through():
    assert StopFilter([]).push('text') == ('text', None)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(RequestError, match='LMD-162.*number 1'):
        StopFilter(['x', ''])


def test_the_work_grows_with_the_text_not_with_its_square():
    def seconds(length: int) -> float:
        stop_filter, start = StopFilter(['a' * length + 'b', 'a' * (length // 2) + 'c']), time.process_time()
        for _ in range(length):
            stop_filter.push('a')
        return time.process_time() - start

    seconds(1000)
    assert min(seconds(16000) for _ in range(3)) < 16 * 8 * min(seconds(1000) for _ in range(3))

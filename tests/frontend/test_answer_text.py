"""Tokens to text with stop strings: what is shown does not depend on how tokens come, and nothing is taken back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.frontend.frontend import AnswerText
from lmdeploy.tokenizer.stops import StopFilter

PIECES = ['a', 'b', 'ab', 'ba', 'abc', '', 'c', 'cab']


class Plain:
    """A detokenizer whose tokens are texts."""

    def push(self, ids):
        return ''.join(PIECES[i] for i in ids)

    def flush(self):
        return ''


def show(chunks, stops, include=False, min_tokens=0):
    answer = AnswerText(Plain(), StopFilter(stops, include), min_tokens)
    text, tokens = '', []
    for chunk in chunks:
        piece = answer.push(chunk, [{t: 0.0} for t in chunk])
        assert [next(iter(p)) for p in piece.logprobs] == piece.token_ids
        text, tokens = text + piece.text, tokens + piece.token_ids
        if answer.stopped:
            return text, tokens, answer.stopped
    piece = answer.flush()
    return text + piece.text, tokens + piece.token_ids, None


TOKENS = st.lists(st.integers(0, len(PIECES) - 1), max_size=20)
STOPS = st.lists(st.sampled_from(['abca', 'cc', 'bb', 'aab', 'bca']), max_size=3)


@given(tokens=TOKENS, stops=STOPS, cuts=st.lists(st.integers(0, 20), max_size=5), include=st.booleans())
def test_chunking_does_not_matter(tokens, stops, cuts, include):
    edges = sorted({0, len(tokens), *(c for c in cuts if c < len(tokens))})
    chunks = [tokens[a:b] for a, b in zip(edges, edges[1:])]
    assert show(chunks, stops, include) == show([tokens], stops, include)


@given(tokens=TOKENS, stops=STOPS)
def test_the_text_ends_before_the_first_stop(tokens, stops):
    whole = ''.join(PIECES[t] for t in tokens)
    text, kept, stopped = show([[t] for t in tokens], stops)
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    if not ends:
        assert (text, kept, stopped) == (whole, tokens, None)
        return
    assert stopped is not None
    assert whole[:min(ends)] == text + stopped
    # exactly the tokens that show something, in order, and no token after the cut
    assert tokens[:len(kept)] == kept
    spelled = ''.join(PIECES[t] for t in kept)
    assert spelled.startswith(text)
    while kept and not PIECES[kept[-1]]:
        kept.pop()
    assert len(''.join(PIECES[t] for t in kept[:-1])) < max(len(text), 1)


def test_tokens_are_held_with_their_text():
    answer = AnswerText(Plain(), StopFilter(['abca']))
    assert answer.push([0]).token_ids == []  # 'a' may begin the stop string
    assert answer.push([1]).token_ids == []
    piece = answer.push([0])  # 'aba': the first two are certain now
    assert (piece.text, piece.token_ids) == ('ab', [0, 1])
    assert (answer.flush().text, answer.stopped) == ('a', None)


@given(tokens=TOKENS, stops=STOPS, most=st.integers(0, 6))
def test_the_first_tokens_are_not_searched_for_stops(tokens, stops, most):
    chunks = [[t] for t in tokens]
    text, kept, stopped = show(chunks[most:], stops)
    free = ''.join(PIECES[t] for t in tokens[:most])
    assert show(chunks, stops, min_tokens=most) == (free + text, tokens[:most] + kept, stopped)

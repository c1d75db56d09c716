"""A bad word never appears in the answer, whatever tokens would spell it; and nothing else is banned."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.frontend.bad_words import BadWords

PIECES = [b'', b'a', b'b', b'c', b'ab', b'ba', b'abc', b'aab', b'cab', b'bca',
          b'\xe4\xbd', b'\xa0', b'\xff', b'c\xffa', b'a\xff', b'ababab']
WORDS = ['a', 'ab', 'aab', 'abab', 'abcab', 'bcab', '你']


class Pieces:
    vocab_size = len(PIECES)

    def token_bytes(self, token_id: int) -> bytes:
        return PIECES[token_id]


@given(prompt=st.lists(st.integers(0, len(PIECES) - 1), max_size=4),
       answer=st.lists(st.integers(0, len(PIECES) - 1), max_size=12),
       words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3))
def test_exactly_the_completing_tokens_are_banned(prompt, answer, words):
    encoded = [word.encode() for word in words]
    text = b''.join(PIECES[t] for t in answer)
    if any(word in text for word in encoded):
        return  # such an answer cannot come about
    processor = BadWords(words, Pieces(), len(prompt))
    logits = processor(torch.tensor(prompt + answer, dtype=torch.long), torch.zeros(len(PIECES)))
    banned = {i for i in range(len(PIECES)) if logits[i] == float('-inf')}
    assert banned == {i for i, piece in enumerate(PIECES) if any(word in text + piece for word in encoded)}

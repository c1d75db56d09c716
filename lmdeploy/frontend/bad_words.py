"""BadWords: texts that must not appear in an answer, whatever tokens they would be spelled with."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

BETWEEN = b'\xff'  # a byte that no word has, as words are UTF-8


class Decoder(Protocol):
    """What this module needs of a tokenizer."""

    vocab_size: int

    def token_bytes(self, token_id: int) -> bytes: ...


class BadWords:
    """A logits processor that bans, at each step, every token that would complete one of the words.

    The answer so far is matched as bytes, so that a word is found across token borders and inside a token. For each
    word a Knuth-Morris-Pratt automaton tells how much of the word the answer's end already spells; the tokens that
    lead from that state through the whole word are found once per (word, state).
    """

    def __init__(self, words: Sequence[str], tokenizer: Decoder, prompt_len: int) -> None:
        self.texts = tuple(words)  # with prompt_len all that another process needs to build the same
        vocabulary = _vocabulary(tokenizer)  # made here rather than in the engine's thread, which would stand still
        self.words = [_Word(word.encode(), vocabulary) for word in words]
        self.tokenizer = tokenizer
        self.prompt_len = prompt_len

    def __call__(self, token_ids: Any, logits: Any) -> Any:
        generated = token_ids[self.prompt_len:]
        longest = max(len(word.text) for word in self.words)
        tail = b''
        for token in reversed(generated[-4 * longest:].tolist()):  # tokens may be empty, hence some to spare
            tail = self.tokenizer.token_bytes(token) + tail
            if len(tail) >= longest:
                break
        for word in self.words:
            logits[word.completing(word.state(tail))] = float('-inf')
        return logits


class _Word:
    """One word's automaton and, per state, the tokens that would complete it."""

    def __init__(self, text: bytes, vocabulary: _Vocabulary) -> None:
        self.text, self.vocabulary = text, vocabulary
        self.failure = [0] * len(text)
        for i in range(1, len(text)):
            self.failure[i] = self._advance(self.failure[i - 1], text[i])
        self.cache: dict[int, list[int]] = {}

    def _advance(self, state: int, byte: int) -> int:
        while state and self.text[state] != byte:
            state = self.failure[state - 1]
        return state + (self.text[state] == byte)

    def state(self, tail: bytes) -> int:
        state = 0
        for byte in tail:
            state = self._advance(state, byte) if state < len(self.text) else self._advance(self.failure[-1], byte)
        return state if state < len(self.text) else self.failure[-1]

    def completing(self, state: int) -> list[int]:
        """The tokens that complete the word when ``state`` bytes of it stand already."""
        if state not in self.cache:
            # the word whole within the token, and every state that a mismatch can fall back to
            if state == 0:
                self.cache[0] = self.vocabulary.containing(self.text)
            else:
                at, completing = state, set(self.completing(0))
                while at:
                    completing.update(self.vocabulary.starting_with(self.text[at:]))
                    at = self.failure[at - 1]
                self.cache[state] = list(completing)
        return self.cache[state]


class _Vocabulary:
    """The bytes of every token, indexed so that a part of a word is looked up at once and not token by token."""

    def __init__(self, tokenizer: Decoder) -> None:
        pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self._joined = BETWEEN.join(pieces)
        self._ends = np.cumsum([len(piece) + 1 for piece in pieces])
        self._order = sorted(range(len(pieces)), key=pieces.__getitem__)
        self._sorted = [pieces[i] for i in self._order]

    def containing(self, text: bytes) -> list[int]:
        """The tokens that ``text`` (not empty) is a part of."""
        hits = []
        at = self._joined.find(text)
        while at >= 0:
            hits.append(at)
            at = self._joined.find(text, at + len(text))
        return np.unique(self._ends.searchsorted(np.array(hits, np.int64), 'right')).tolist()

    def starting_with(self, text: bytes) -> list[int]:
        """The tokens that begin with ``text``, which is not empty."""
        after = text[:-1] + bytes([text[-1] + 1])
        return self._order[bisect_left(self._sorted, text):bisect_left(self._sorted, after)]


_vocabularies: WeakKeyDictionary[Decoder, _Vocabulary] = WeakKeyDictionary()


def _vocabulary(tokenizer: Decoder) -> _Vocabulary:
    """The index of a tokenizer's tokens, made once."""
    found = _vocabularies.get(tokenizer)
    if found is None:
        found = _vocabularies[tokenizer] = _Vocabulary(tokenizer)
    return found

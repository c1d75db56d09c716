"""BadWords: texts that must not appear in an answer, whatever tokens they would be spelled with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary


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
        self.words = [_Word(word.encode(), tokenizer) for word in words]
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

    def __init__(self, text: bytes, tokenizer: Decoder) -> None:
        self.text, self.tokenizer = text, tokenizer
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
            # every state that a mismatch can fall back to, and the word whole within the token
            endings, at = [], state
            while at:
                endings.append(self.text[at:])
                at = self.failure[at - 1]
            prefixes = tuple(endings)
            self.cache[state] = [
                i for i, piece in enumerate(_pieces(self.tokenizer))
                if self.text in piece or (prefixes and piece.startswith(prefixes))
            ]
        return self.cache[state]


_vocabularies: WeakKeyDictionary[Decoder, list[bytes]] = WeakKeyDictionary()


def _pieces(tokenizer: Decoder) -> list[bytes]:
    """The bytes of every token, spelled out once per tokenizer."""
    pieces = _vocabularies.get(tokenizer)
    if pieces is None:
        pieces = _vocabularies[tokenizer] = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    return pieces

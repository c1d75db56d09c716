"""The model's vocabulary as the automata see it: the bytes of every token, and which tokens are no text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmdeploy.errors import RequestError
from lmdeploy.grammar.automata import load
from lmdeploy.tokenizer.vocabulary import Place

if TYPE_CHECKING:
    from lmdeploy.tokenizer import Tokenizer


class TokenBytes:
    """A :class:`lmdeploy.tokenizer.Tokenizer` in the form that ``LLTokenizer`` takes.

    Args:
        size: rows of the model's logits; ids beyond the tokenizer's are never allowed.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._vocabulary = tokenizer.vocabulary
        known = min(size, tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(token) for token in range(known)] + [b''] * (size - known)
        ends = sorted(token for token in tokenizer.eos_token_ids if token < size)
        if not ends:
            raise RequestError('LMD-328')
        self.end_ids = ends
        self.eos_token_id = ends[0]
        special = {*tokenizer.special_ids, *tokenizer.control_tokens.values(), *ends}
        self.special_token_ids = sorted(token for token in special if token < size)
        self._by_bytes: dict[bytes, int] = {}
        plain = set(range(size)).difference(self.special_token_ids)
        for token in sorted(plain, reverse=True):  # of several, the lowest id
            if self.tokens[token]:
                self._by_bytes[self.tokens[token]] = token
        self._longest = max(map(len, self._by_bytes), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids whose bytes are exactly ``text``: how the model itself would write a text that the grammar dictates."""
        data = text.encode() if isinstance(text, str) else text
        tokens = self._vocabulary.encode_section(data.decode('utf-8', 'replace'), Place.INSIDE)
        if b''.join(self.tokens[token] for token in tokens if token < len(self.tokens)) == data:
            return tokens
        return self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token that fits, again and again; for tokenizers that normalise their input."""
        tokens, at = [], 0
        while at < len(data):
            widths = range(min(self._longest, len(data) - at), 0, -1)
            width = next((n for n in widths if data[at:at + n] in self._by_bytes), 0)
            if not width:
                break
            tokens.append(self._by_bytes[data[at:at + width]])
            at += width
        return tokens


def build_vocabulary(tokens: TokenBytes) -> Any:
    """The ``LLTokenizer``; a second for 150,000 tokens."""
    library = load()
    return library.LLTokenizer(tokens, n_vocab=len(tokens.tokens), eos_token=tokens.end_ids)

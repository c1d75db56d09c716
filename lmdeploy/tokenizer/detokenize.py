"""Ids to text as they come: never half a character, and never a different text than decoding all ids at once.

Each token adds bytes (:mod:`lmdeploy.tokenizer.spelling`), and an incremental UTF-8 decoder holds back what may still
become a character: at most three bytes, whatever the length of the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmdeploy.tokenizer.tokenizer import Tokenizer

_utf8 = codecs.getincrementaldecoder('utf-8')


class Detokenizer:
    """Streams one text: all ``push`` results and ``flush`` together are ``tokenizer.decode`` of all ids.

    Args:
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: accepted for its name's sake; the vocabularies here keep every space inside
            their tokens, so there is none to put between.
        continues: the ids go on from an earlier text, so that the space before a first word is kept.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True,
                 spaces_between_special_tokens: bool = True, *, continues: bool = False) -> None:
        self._spell = tokenizer.vocabulary.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._first = not continues
        self._strip = 0 if continues else tokenizer.vocabulary.spelling.strip
        self._decoder = _utf8('replace')

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain with these further ids; what may still change is held back."""
        return self._read(ids, final=False)

    def flush(self) -> str:
        """The end of the text: U+FFFD if the ids stopped inside a character, else nothing."""
        return self._read((), final=True)

    def _read(self, ids: Iterable[int], final: bool) -> str:
        pieces = []
        for token in ids:
            if token not in self._skipped:
                pieces.append(self._spell(token, self._first))
                self._first = False
        text = self._decoder.decode(b''.join(pieces), final)
        if self._strip and text:
            kept = text.lstrip(' ')
            dropped = min(self._strip, len(text) - len(kept))
            self._strip = 0 if kept else self._strip - dropped
            text = text[dropped:]
        return text


@dataclass(slots=True)
class DetokenizeState:
    """Where an incremental decoding stands.

    Attributes:
        ids_offset: how many of the ids have been read; start with the prompt's length to get the answer's text only.
    """

    ids_offset: int = 0
    detokenizer: Detokenizer | None = field(default=None, repr=False)

    def read(self, tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool,
             spaces_between_special_tokens: bool) -> str:
        """The text of the ids that came since the last call."""
        if self.detokenizer is None:
            self.detokenizer = Detokenizer(tokenizer, skip_special_tokens, spaces_between_special_tokens,
                                           continues=self.ids_offset > 0)
        new, self.ids_offset = ids[self.ids_offset:], max(self.ids_offset, len(ids))
        return self.detokenizer.push(new)

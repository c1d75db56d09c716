"""What a vocabulary is to the tokenizer: encoding with and without added tokens, and the spelling of every id.

Two kinds exist, :class:`lmdeploy.tokenizer.fast.FastVocabulary` (the ``tokenizers`` library) and
:class:`lmdeploy.tokenizer.spm.SpmVocabulary` (SentencePiece); everything above works on this face alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token matched as a whole string before the model splits the text.

    Attributes:
        special: left out of decoded text when special tokens are skipped.
        lstrip, rstrip: the match swallows the white space before, after it.
    """

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    @property
    def is_control(self) -> bool:
        """Whether text of a user must never become this token.

        Every special token, and every other added token that looks like markup: ``<tool_call>`` and ``<think>`` are
        added as ordinary tokens by their models, but steer them all the same. White space runs and plain words
        (letters, digits, spaces) are text and stay usable.
        """
        return self.special or not all(c.isalnum() or c.isspace() or c == '\u2581' for c in self.content)


class Place(Enum):
    """Where a section of text stands, which decides whether a model's prefix space is put before it."""

    START = 'start'    # at the start of the text
    AFTER = 'after'    # after an added token
    INSIDE = 'inside'  # directly after other text: never a prefix space


@dataclass(frozen=True, slots=True)
class Spelling:
    """The rule that joins the bytes of tokens to text.

    Attributes:
        strip: how many spaces at the start of the whole text are dropped (the model's own prefix space).
    """

    strip: int = 0


class Vocabulary(Protocol):
    """One model's vocabulary, without beginning- or end-of-sequence tokens."""

    added: dict[str, AddedToken]
    size: int            # highest id + 1
    spelling: Spelling

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, added tokens recognised."""

    def encode_section(self, text: str, place: Place) -> list[int]:
        """Ids of ``text`` by the model alone: no control token is recognised."""

    def piece(self, token: int) -> str | None:
        """The token as the vocabulary writes it; None if there is no such id."""

    def token_bytes(self, token: int, first: bool = False) -> bytes:
        """The bytes that the token adds to decoded text (``first``: as the first token of it)."""

    def find(self, piece: str) -> int | None:
        """The id of a piece; None if there is none."""

    def control_pieces(self) -> Iterable[str]:
        """Strings that the model itself would turn into a control token's id, besides the added tokens' contents."""

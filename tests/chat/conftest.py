"""Stand-ins for tokenizers: chat templates ask for a few facts only."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

CHATML = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|image_pad|>')


@dataclass
class Facts:
    """What a template wants to know of a tokenizer."""

    chat_template: str | None = None
    special: tuple[str, ...] = CHATML
    ordinary: tuple[str, ...] = ('<tool_call>', '</tool_call>', '<think>', '</think>')
    bos_token_id: int | None = None
    eos_token_id: int | None = 2
    added_tokens: dict[str, int] = field(init=False)
    special_tokens: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.added_tokens = {text: i for i, text in enumerate((*self.special, *self.ordinary))}
        self.special_tokens = {text: self.added_tokens[text] for text in self.special}

    @property
    def control_tokens(self) -> dict[str, int]:
        return self.added_tokens

    def token_piece(self, token: int) -> str:
        return {i: text for text, i in self.added_tokens.items()}.get(token, '')


@pytest.fixture
def facts() -> type[Facts]:
    return Facts

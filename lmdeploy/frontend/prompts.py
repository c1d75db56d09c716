"""The prompt forms that users may hand in, sorted out into one type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmdeploy.errors import RequestError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: exactly one of the three is not None.

    Attributes:
        text: a user's turn (or, without a chat template, the raw text).
        messages: an OpenAI-style conversation.
        token_ids: ready tokens; no template, no tokenizer.
    """

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    token_ids: list[int] | None = None


def classify(prompts: Any) -> tuple[list[Prompt | RequestError], bool]:
    """Sort out what ``pipe(...)`` was given.

    ``str``, one list of messages and one list of token ids are single prompts; a list of any of these is a batch. A
    list whose first element is a dict is one conversation, a list of integers one tokenised prompt.

    Returns:
        The prompts, an error in the place of each that has no known form, and whether it was a single one.
    """
    if isinstance(prompts, list) and not _is_single(prompts):
        return [_one(p) for p in prompts], False
    return [_one(prompts)], True


def _is_single(prompts: list) -> bool:
    return bool(prompts) and (isinstance(prompts[0], dict) or _is_token(prompts[0]))


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one(prompt: Any) -> Prompt | RequestError:
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if isinstance(prompt, tuple):
        return RequestError('LMD-304')
    if isinstance(prompt, list) and prompt:
        if all(isinstance(m, dict) for m in prompt):
            return Prompt(messages=prompt)
        if all(_is_token(t) for t in prompt):
            return Prompt(token_ids=prompt)
    return RequestError('LMD-303', given=_describe(prompt))


def _describe(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        kinds = sorted({type(v).__name__ for v in value})
        return f'a {type(value).__name__} of {", ".join(kinds)}' if kinds else f'an empty {type(value).__name__}'
    name = type(value).__name__
    return f'an {name}' if name[0] in 'aeiou' else f'a {name}'

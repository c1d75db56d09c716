"""The prompt forms that users may hand in, sorted out into one type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmdeploy.errors import RequestError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: exactly one of the first three is not None.

    Attributes:
        text: a user's turn (or, without a chat template, the raw text).
        messages: an OpenAI-style conversation.
        token_ids: ready tokens; no template, no tokenizer.
        images: the pictures of ``text``, in any form that ``load_image`` takes.
    """

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    token_ids: list[int] | None = None
    images: tuple[Any, ...] = ()

    @property
    def has_pictures(self) -> bool:
        """Whether a part of it is something else than text or tokens."""
        return bool(self.images) or any(
            isinstance(part, dict) and part.get('type', 'text') != 'text'
            for message in self.messages or () if isinstance(message, dict)
            and isinstance(message.get('content'), (list, tuple)) for part in message['content'])


def classify(prompts: Any) -> tuple[list[Prompt | RequestError], bool]:
    """Sort out what ``pipe(...)`` was given.

    ``str``, ``(str, picture or list of pictures)``, one list of messages and one list of token ids are single prompts;
    a list of any of these is a batch. A list whose first element is a dict is one conversation, a list of integers one
    tokenised prompt.

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
        if len(prompt) == 2 and isinstance(prompt[0], str) and prompt[1] is not None:
            images = prompt[1] if isinstance(prompt[1], (list, tuple)) else (prompt[1],)
            return Prompt(text=prompt[0], images=tuple(images))
        return RequestError('LMD-303', given=_describe(prompt))
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

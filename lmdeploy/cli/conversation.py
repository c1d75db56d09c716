"""Conversation: what was said so far in the terminal, and asking for the next answer.

:class:`Talk` is what the loop asks of one; :class:`Conversation` is that with a model in this process. It stands on the
frontend rather than on ``Pipeline.chat``, because the frontend hands over an error as an object, which can be told in
either language, and takes a system prompt that changes between turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmdeploy.frontend.bridge import LoopThread
from lmdeploy.frontend.frontend import AsyncFrontend, RequestOutput
from lmdeploy.frontend.prompts import Prompt
from lmdeploy.messages import GenerationConfig


class Talk(Protocol):
    """A conversation with a model, wherever that is.

    Attributes:
        gen: how answers are generated; may be replaced between turns.
        system: the system prompt; None leaves it to the template. May be replaced, too.
        turns: user and assistant messages, alternating.
        vocab_size: of the model.
    """

    gen: GenerationConfig
    system: str | None
    turns: list[dict[str, Any]]

    @property
    def vocab_size(self) -> int: ...

    def ask(self, question: str) -> Iterator[RequestOutput]:
        """The pieces of the answer; closing the iterator, or an interrupt, stops it."""
        ...

    def reset(self) -> None:
        """Forget what was said; the system prompt and the settings stay."""
        ...

    def close(self) -> None:
        """End it; what still runs stops."""
        ...


@dataclass(slots=True)
class Conversation:
    """Asks questions of a model; each finished turn becomes part of the next prompt.

    Attributes:
        frontend: the model, as text.
        gen: how answers are generated; may be replaced between turns.
        system: the system prompt; None leaves it to the template.
        turns: user and assistant messages, alternating.
        images: pictures that the next question is about.
    """

    frontend: AsyncFrontend
    gen: GenerationConfig
    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    loop: LoopThread = field(default_factory=LoopThread)

    @property
    def vocab_size(self) -> int:
        return self.frontend.capacity.vocab_size

    def ask(self, question: str) -> Iterator[RequestOutput]:
        """The pieces of the answer.

        Closing the iterator, or an interrupt, stops the answer; what was said until then is remembered. A turn that
        failed is not.
        """
        system = [{'role': 'system', 'content': self.system}] if self.system is not None else []
        turn: dict[str, Any] = {'role': 'user', 'content': question}
        if self.images:
            turn['content'] = [*({'type': 'image', 'image': image} for image in self.images),
                               {'type': 'text', 'text': question}]
        prompt = Prompt(messages=[*system, *self.turns, turn])
        pieces = self.loop.iterate(self.frontend.generate(prompt, self.gen))
        answer, failed = '', False
        try:
            for piece in pieces:
                answer += piece.text
                failed = piece.finish_reason == 'error'
                yield piece
        finally:
            pieces.close()  # type: ignore[attr-defined]
            if answer and not failed:
                self.turns += [turn, {'role': 'assistant', 'content': answer}]
                self.images = []

    def reset(self) -> None:
        """Forget what was said; the system prompt and the settings stay."""
        self.turns.clear()

    def close(self) -> None:
        """Stop the loop thread."""
        self.loop.close()

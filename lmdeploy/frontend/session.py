"""Session: a multi-turn conversation, as ``pipeline.chat`` carries it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lmdeploy.messages import GenerationConfig, Response


class Session:
    """What was said so far, and the answer to the latest turn.

    Attributes:
        history: ``[(prompt, answer text)]`` of the finished turns.
        response: the latest turn's :class:`Response`.
        generator: with ``stream_response=True``, the iterator of the running turn's pieces; the turn joins the history
            when it is exhausted.
    """

    def __init__(self, session_id: int, chat: Callable[..., Session],
                 gen_config: GenerationConfig | None = None) -> None:
        self._id = session_id
        self._step = 0  # tokens of the conversation so far
        self._prompt: Any = None
        self._response: Response | None = None
        self._gen_config = gen_config
        self._chat = chat
        self.history: list[tuple[Any, str]] = []
        self.generator: Iterator[Response] | None = None

    @property
    def response(self) -> Response | None:
        return self._response

    def messages(self, prompt: Any) -> list[dict[str, Any]]:
        """The conversation with ``prompt`` (a text, one with pictures, or a list of messages) as its new turn."""
        turns: list[dict[str, Any]] = []
        for said, answer in self.history:
            turns += [*_turn(said), {'role': 'assistant', 'content': answer}]
        return turns + _turn(prompt)

    def begin(self, prompt: Any) -> None:
        """A new turn starts."""
        self._prompt, self._response, self.generator = prompt, None, None

    def finish(self, response: Response) -> None:
        """A turn ended: remember it, unless it failed."""
        self._response, self.generator = response, None
        if response.finish_reason != 'error':
            self.history.append((self._prompt, response.text))
            self._step = response.input_token_len + response.generate_token_len

    def stop(self) -> None:
        """Stop a running turn; what it said so far joins the history."""
        if self.generator is not None:
            self.generator.close()  # type: ignore[attr-defined]
            self.generator = None

    def close(self) -> None:
        """Forget the conversation; a running turn is stopped."""
        self.stop()
        self.history.clear()
        self._step, self._prompt, self._response, self.generator = 0, None, None, None

    def __call__(self, prompt: Any, gen_config: GenerationConfig | None = None, stream_response: bool = True,
                 do_preprocess: bool = True) -> Response | Iterator[Response]:
        """Say ``prompt`` and return the answer's pieces, or with ``stream_response=False`` the whole answer."""
        self._chat(prompt, session=self, gen_config=gen_config or self._gen_config, stream_response=stream_response,
                   do_preprocess=do_preprocess)
        answer = self.generator if stream_response else self._response
        assert answer is not None
        return answer

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return ''.join(f'USER:\n{prompt}\nASSISTANT:\n{answer}\n' for prompt, answer in self.history)


def _turn(prompt: Any) -> list[dict[str, Any]]:
    if isinstance(prompt, tuple):
        text, images = prompt
        pictures = images if isinstance(images, (list, tuple)) else (images,)
        return [{'role': 'user', 'content': [{'type': 'text', 'text': text},
                                             *({'type': 'image', 'image': image} for image in pictures)]}]
    return prompt if isinstance(prompt, list) else [{'role': 'user', 'content': prompt}]

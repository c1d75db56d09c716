"""RemoteConversation: a conversation in the terminal whose model is behind a server, which remembers what was said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lmdeploy.errors import LmdeployError
from lmdeploy.frontend.frontend import RequestOutput
from lmdeploy.messages import GenerationConfig
from lmdeploy.serve.openai.api_client import APIClient, ServerError

FIELDS = {'temperature': 'temperature', 'top_p': 'top_p', 'top_k': 'top_k', 'min_p': 'min_p',
          'repetition_penalty': 'repetition_penalty', 'max_new_tokens': 'request_output_len',
          'min_new_tokens': 'min_new_tokens', 'random_seed': 'seed', 'ignore_eos': 'ignore_eos', 'stop_words': 'stop',
          'skip_special_tokens': 'skip_special_tokens'}
"""Settings that the server's sessions have, and their names there."""


@dataclass(slots=True)
class RemoteConversation:
    """A :class:`lmdeploy.cli.conversation.Talk` over ``/v1/chat/interactive``.

    A turn sends the question alone, as long as the server is known to remember the turns before; after a turn that was
    stopped or failed, and when the system prompt has changed, the session begins anew with everything that was said.

    Attributes:
        session_id: of the server's session; another conversation of the same number would be mixed with this one.
    """

    client: APIClient
    session_id: int
    gen: GenerationConfig
    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    _remembered: list[dict[str, str]] | None = None  # what the server has been told

    vocab_size = 1 << 31  # the server checks token ids

    def ask(self, question: str) -> Iterator[RequestOutput]:
        """The pieces of the answer.

        Raises:
            LmdeployError: the server cannot be reached.
        """
        turn = {'role': 'user', 'content': question}
        known = [*self._opening(), *self.turns]
        prompt: str | list[dict[str, str]] = question
        if self._remembered != known:
            self.client.end_session(self.session_id)
            prompt = [*known, turn]
        self._remembered = None
        fields: dict[str, Any] = {name: getattr(self.gen, ours) for ours, name in FIELDS.items()}
        items = self.client.chat_interactive_v1(prompt, session_id=self.session_id, interactive_mode=True, stream=True,
                                                **fields)
        answer, ended, failed = '', False, False
        try:
            for item in items:
                output = _output(item)
                answer += output.text
                failed = output.error is not None
                yield output
            ended = True
        finally:
            items.close()  # type: ignore[attr-defined]
            if answer and not failed:
                self.turns += [turn, {'role': 'assistant', 'content': answer}]
                self._remembered = [*self._opening(), *self.turns] if ended else None

    def _opening(self) -> list[dict[str, str]]:
        return [{'role': 'system', 'content': self.system}] if self.system is not None else []

    def reset(self) -> None:
        self.turns.clear()

    def close(self) -> None:
        """Let the server forget the conversation."""
        self._remembered = None
        with suppress(LmdeployError):  # it is gone, and with it all that it remembered
            self.client.end_session(self.session_id)


def _output(item: dict[str, Any]) -> RequestOutput:
    if 'error' in item or 'text' not in item:
        return RequestOutput('', [], 0, 0, finish_reason='error', error=ServerError(item))
    return RequestOutput(item['text'], [], item['input_tokens'] + item['history_tokens'], item['tokens'],
                         finish_reason=item['finish_reason'])

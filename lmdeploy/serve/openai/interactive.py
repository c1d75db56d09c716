"""``POST /v1/chat/interactive``: conversations that the server remembers.

With ``interactive_mode`` a request goes on where the last one of its ``session_id`` ended; without, it stands alone.
An empty prompt with ``request_output_len`` 0 and without ``interactive_mode`` ends a session; ``cancel`` stops what
runs in it. Sessions belong to a key: others can neither read nor end them.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lmdeploy.frontend.prompts import Prompt
from lmdeploy.messages import GenerationConfig
from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.errors import HttpError, body, describe
from lmdeploy.serve.generation import Work, generate
from lmdeploy.serve.http import Request, Response, Stream, json_reply
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.openai.answers import InteractiveAnswer
from lmdeploy.serve.openai.convert import messages, or_default, stop_texts
from lmdeploy.serve.openai.protocol import InteractiveRequest


@dataclass(slots=True)
class Conversation:
    """What was said in a session, and the tokens of all its turns."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0

    @property
    def size(self) -> int:
        return len(msgspec.json.encode(self.messages))


class Conversations:
    """The remembered sessions, the least recently used first; bounded in number and size."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sessions: OrderedDict[tuple[str, int], Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, caller: str, session_id: int) -> Conversation:
        """The conversation so far; a new one where there is none."""
        return self._sessions.get((caller, session_id)) or Conversation()

    def keep(self, caller: str, session_id: int, conversation: Conversation) -> None:
        """Remember a conversation, unless it has grown too large; then it is forgotten."""
        key = (caller, session_id)
        self._sessions.pop(key, None)
        if conversation.size <= self._limits.session_bytes:
            self._sessions[key] = conversation
        while len(self._sessions) > self._limits.sessions:
            self._sessions.popitem(last=False)

    def end(self, caller: str, session_id: int) -> None:
        self._sessions.pop((caller, session_id), None)


class Interactive:
    """The handler, over a server's context."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self.conversations = Conversations(context.limits)
        self._ids = itertools.count(1 << 40)  # of sessions whose clients leave the choice to us

    async def __call__(self, ask: InteractiveRequest, request: Request) -> Response:
        context = self.context
        request.model = context.model_names[0]
        caller, session = request.caller.id, ask.session_id
        if ask.cancel:
            if session < 0:
                raise HttpError('LMD-512', param='session_id', reason='there is no session to cancel')
            for running in [r for r in context.running if (r.caller, r.session_id) == (caller, session)]:
                running.abort()
            return json_reply(InteractiveAnswer('', 0, 0, 0, 'stop'))
        if not ask.prompt and not ask.interactive_mode and ask.request_output_len == 0:
            self.conversations.end(caller, session)
            return json_reply(InteractiveAnswer('', 0, 0, 0, 'stop'))
        if session < 0:
            session = next(self._ids)
        pieces = self._pieces(request, ask, session)
        if ask.stream:
            return Stream(_lines(pieces), lambda error: _error_line(error, request.id))
        whole = InteractiveAnswer('', 0, 0, 0, None)
        async for piece in pieces:
            piece.text = whole.text + piece.text
            whole = piece
        return json_reply(whole)

    async def _pieces(self, request: Request, ask: InteractiveRequest,
                      session: int) -> AsyncGenerator[InteractiveAnswer, None]:
        caller, limits = request.caller.id, self.context.limits
        known = self.conversations.get(caller, session) if ask.interactive_mode else Conversation()
        new = ([{'role': 'user', 'content': ask.prompt}] if isinstance(ask.prompt, str)
               else messages(ask.prompt, limits))
        turns = known.messages + new
        limits.check('messages', turns, 'prompt')
        text = ''
        async with generate(self.context, request, [Work(Prompt(messages=turns), _gen(ask, limits))],
                            session_id=session) as answers:
            async for output in answers.outputs:
                text += output.text
                history = min(known.tokens, output.input_len)
                yield InteractiveAnswer(output.text, output.generated_len, output.input_len - history, history,
                                        output.finish_reason)
            total = answers.usage.prompt + answers.usage.generated
        if ask.interactive_mode:
            turns = [*turns, {'role': 'assistant', 'content': text}]
            self.conversations.keep(caller, session, Conversation(turns, total))


def _gen(ask: InteractiveRequest, limits: Limits) -> GenerationConfig:
    limits.check('max_tokens', ask.request_output_len or 0, 'request_output_len')
    return GenerationConfig(
        do_sample=True, max_new_tokens=ask.request_output_len, temperature=ask.temperature, top_p=ask.top_p,
        top_k=ask.top_k, min_p=ask.min_p, repetition_penalty=ask.repetition_penalty, random_seed=ask.seed,
        ignore_eos=ask.ignore_eos, stop_words=stop_texts(ask.stop, limits), min_new_tokens=ask.min_new_tokens,
        skip_special_tokens=or_default(ask.skip_special_tokens, True),
        spaces_between_special_tokens=or_default(ask.spaces_between_special_tokens, True))


async def _lines(pieces: AsyncGenerator[InteractiveAnswer, None]) -> AsyncGenerator[bytes, None]:
    """LMDeploy's form of this stream: one JSON object a line, without ``data:``."""
    try:
        async for piece in pieces:
            yield msgspec.json.encode(piece) + b'\n'
    finally:
        await pieces.aclose()


def _error_line(error: BaseException, request_id: str) -> bytes:
    return body(*describe(error, request_id)) + b'\n'

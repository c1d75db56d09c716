"""Texts to tokens and back: ``/v1/encode``, ``/tokenize``, ``/detokenize``. No engine, no queue; off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from lmdeploy.frontend.frontend import MAX_CHARS_PER_TOKEN, AsyncFrontend
from lmdeploy.frontend.prompts import Prompt
from lmdeploy.messages import GenerationConfig
from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.http import Request, Response, json_reply
from lmdeploy.serve.openai.answers import Detokenized, Encoded, Tokenized
from lmdeploy.serve.openai.convert import messages, or_default, plain_tools
from lmdeploy.serve.openai.protocol import DetokenizeRequest, EncodeRequest, TokenizeRequest

T = TypeVar('T')


class _Handler:
    """What the three have in common."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    def name(self, request: Request, model: str | None) -> None:
        if model is not None:
            request.model = model
            self.context.check_model(model)

    async def in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.context.pool, work)


class Encode(_Handler):
    """``POST /v1/encode``."""

    async def __call__(self, body: EncodeRequest, request: Request) -> Response:
        frontend = self.context.frontend()
        self.name(request, body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        self.context.limits.check('prompts', texts, 'input')
        for text in texts:
            _refuse_huge(frontend, text, 'input')

        def encode() -> list[list[int]]:
            return [_encode(frontend, text, bool(body.do_preprocess), or_default(body.add_bos, True))
                    for text in texts]

        ids = await self.in_thread(encode)
        lengths = [len(one) for one in ids]
        one = isinstance(body.input, str)
        return json_reply(Encoded([*ids[0]], lengths[0]) if one else Encoded([*ids], lengths))


def _encode(frontend: AsyncFrontend, text: str, do_preprocess: bool, add_bos: bool) -> list[int]:
    if not do_preprocess:
        return frontend.tokenizer.encode(text, add_bos=add_bos)
    segments = frontend.template.render_prompt(text, sequence_start=add_bos)
    return frontend.tokenizer.encode_segments(segments, add_bos=add_bos and frontend.template.add_bos)


def _refuse_huge(frontend: AsyncFrontend, text: str, param: str) -> None:
    most = MAX_CHARS_PER_TOKEN * frontend.capacity.session_len
    if len(text) > most:
        raise HttpError('LMD-512', param=param, reason=f'{len(text):,} characters are beyond the limit of {most:,}')


class Tokenize(_Handler):
    """``POST /tokenize``."""

    async def __call__(self, body: TokenizeRequest, request: Request) -> Response:
        frontend, limits = self.context.frontend(), self.context.limits
        self.name(request, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise HttpError('LMD-512', param='prompt', reason='give either prompt or messages')
        if body.prompt is not None:
            prompt = body.prompt
            _refuse_huge(frontend, prompt, 'prompt')
            tokens = await self.in_thread(lambda: frontend.tokenizer.encode(
                prompt, add_bos=or_default(body.add_special_tokens, True)))
        else:
            said = Prompt(messages=messages(body.messages or [], limits))
            conversation = await self.context.load_pictures(frontend, said)
            tools = plain_tools(body.tools, limits) if body.tools else None
            prepared = await self.in_thread(lambda: frontend.prepare(
                conversation, GenerationConfig(), tools=tools, enable_thinking=body.enable_thinking,
                chat_template_kwargs=body.chat_template_kwargs))
            tokens = prepared.tokens
        return json_reply(Tokenized(len(tokens), frontend.capacity.session_len, tokens))


class Detokenize(_Handler):
    """``POST /detokenize``."""

    async def __call__(self, body: DetokenizeRequest, request: Request) -> Response:
        frontend = self.context.frontend()
        self.name(request, body.model)
        vocab = frontend.capacity.vocab_size
        if len(body.tokens) > 8 * frontend.capacity.session_len:
            raise HttpError('LMD-512', param='tokens', reason='there are far more than the model reads')
        if any(token >= vocab for token in body.tokens):
            raise HttpError('LMD-512', param='tokens', reason=f'the vocabulary has {vocab} tokens')
        text = await self.in_thread(lambda: frontend.tokenizer.decode(
            body.tokens, skip_special_tokens=bool(body.skip_special_tokens)))
        return json_reply(Detokenized(text))

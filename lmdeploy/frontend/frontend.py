"""AsyncFrontend: one request's way from a prompt to text, the same for pipeline and server.

A request is prepared (template, tokens, limits, sampling parameters), submitted to an :class:`EngineClient`, and its
token deltas become text deltas: detokenised without ever cutting a character, searched for stop texts across token
borders. Closing the generator aborts the request.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from lmdeploy.chat.messages import get_text
from lmdeploy.engine.plan import Logprobs
from lmdeploy.engine.request import EngineInput, Grammar, ImageSpan, TokenDelta
from lmdeploy.engine.sampling import Rows, SamplingParams
from lmdeploy.errors import EngineDead, LmdeployError, RequestError
from lmdeploy.executor.base import Capacity
from lmdeploy.frontend import params
from lmdeploy.frontend.pictures import Pictures
from lmdeploy.frontend.prompts import Prompt
from lmdeploy.grammar.checker import Checker
from lmdeploy.grammar.compiler import Compiler
from lmdeploy.grammar.formats import Source, read_format
from lmdeploy.grammar.sandbox import Sandbox
from lmdeploy.messages import FinishReason, GenerationConfig
from lmdeploy.tokenizer.detokenize import Detokenizer
from lmdeploy.tokenizer.stops import StopFilter

POOLED = SamplingParams(max_new_tokens=0, output_hidden='all')
NO_TEXT = params.TextRules((), False, True, True, False)
MAX_CHARS_PER_TOKEN = 8  # a prompt of more characters than this per token of context is refused unread


class EngineClient(Protocol):
    """A way to the engine: a thread of this process, or another process."""

    def submit(self, request: EngineInput) -> AsyncGenerator[TokenDelta, None]: ...

    def abort(self, request_id: str) -> None: ...

    def stats(self) -> Any: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class RequestOutput:
    """What is new in one answer: text and tokens since the last one, counts and outcome so far."""

    text: str
    token_ids: list[int]
    input_len: int
    generated_len: int
    choice: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[dict[int, float]] | None = None
    logits: Any = None  # [rows, vocab] of the whole request, with the last output
    hidden: Any = None  # [rows, hidden], the same
    error: LmdeployError | None = None
    cached_tokens: int = 0
    stop_text: str | None = None  # that ended it; None: something else did, or an end token


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready for the engine: its tokens, and parameters for each of its ``n`` answers."""

    tokens: list[int]
    choices: list[SamplingParams]
    rules: params.TextRules
    grammar: Source | None = None
    images: tuple[ImageSpan, ...] = ()


class AsyncFrontend:
    """Serves requests over an engine client; usable from any event loop, and from several at once.

    Args:
        client: the engine.
        tokenizer: the model's :class:`lmdeploy.tokenizer.Tokenizer`.
        template: its :class:`lmdeploy.chat.ChatTemplate`.
        capacity: what the started engine holds.
        model_len: the context length that the model was made for, for the error text.
        grammars: makes what a request's grammar is for the engine; None: compiles it, for an engine in this process.
        pictures: puts pictures into prompts; None: the model reads text only.
    """

    def __init__(self, client: EngineClient, tokenizer: Any, template: Any, capacity: Capacity, model_len: int,
                 grammars: Compiler | Checker | None = None, pictures: Pictures | None = None) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.template = template
        self.capacity = capacity
        self.model_len = model_len
        self.grammars = grammars or Compiler(tokenizer, capacity.vocab_size, sandbox=Sandbox())
        self.pictures = pictures
        self._ids = itertools.count()

    def prepare(self, prompt: Prompt, gen: GenerationConfig, *, do_preprocess: bool = True,
                sequence_start: bool = True, tools: list[dict] | None = None, enable_thinking: bool | None = None,
                chat_template_kwargs: dict[str, Any] | None = None, pooled: bool = False) -> Prepared:
        """Template, tokens, limits, parameters. Thread-safe, so that long prompts need not hold up an event loop.

        ``pooled`` requests want one vector of the prompt. An encoder has no others, and needs of ``gen`` nothing; of a
        decoder, ``gen`` asks for it.

        Raises:
            RequestError: the prompt or a parameter cannot be served (LMD-301 and following).
        """
        if self.capacity.pooling is not None:
            return self._prepare_pooled(prompt, pooled)
        params.check(gen, self.capacity.vocab_size)
        tokens, images = self._tokens(prompt, do_preprocess, sequence_start, tools, enable_thinking,
                                      chat_template_kwargs)
        if not tokens:
            raise RequestError('LMD-302')
        session_len = self.capacity.session_len
        if len(tokens) >= session_len:
            raise RequestError('LMD-301', prompt_len=len(tokens), session_len=session_len,
                               parts=self._parts(prompt, len(tokens)), model_len=self.model_len)
        stops = self.template.stop_words if do_preprocess or prompt.messages else ()
        choices, rules = params.resolve(gen, self.tokenizer, stops, prompt_len=len(tokens), session_len=session_len,
                                        continues=prompt.text is not None and not do_preprocess)
        return Prepared(tokens, choices, rules, read_format(gen.response_format), images)

    def _prepare_pooled(self, prompt: Prompt, pooled: bool) -> Prepared:
        """A request of an encoder."""
        if not pooled:
            raise RequestError('LMD-308')
        tokens, _ = self._tokens(prompt, False, True, None, None, None)
        if not tokens:
            raise RequestError('LMD-302')
        if len(tokens) > self.capacity.session_len:
            raise RequestError('LMD-309', prompt_len=len(tokens), session_len=self.capacity.session_len,
                               model_len=self.model_len)
        return Prepared(tokens, [POOLED], NO_TEXT)

    def _parts(self, prompt: Prompt, total: int) -> str:
        """What the tokens of a prompt that is too long are spent on."""
        if not prompt.messages:
            return '1 prompt'
        counts = {'system': 0, 'history': 0, 'last message': 0}
        for i, message in enumerate(prompt.messages):
            last = i == len(prompt.messages) - 1
            name = 'system' if message['role'] in ('system', 'developer') else 'last message' if last else 'history'
            text = get_text(message.get('content'))
            counts[name] += len(self.tokenizer.encode(text, add_bos=False, add_special_tokens=False))
        counts['template and tools'] = max(total - sum(counts.values()), 0)
        return f'{len(prompt.messages)} messages; ' + ', '.join(f'{k} {v}' for k, v in counts.items() if v)

    def _tokens(self, prompt: Prompt, do_preprocess: bool, sequence_start: bool, tools: list[dict] | None,
                enable_thinking: bool | None, chat_template_kwargs: dict[str, Any] | None
                ) -> tuple[list[int], tuple[ImageSpan, ...]]:
        if prompt.token_ids is not None:
            for token in prompt.token_ids:
                if not 0 <= token < self.capacity.vocab_size:
                    raise RequestError('LMD-305', token=token, vocab_size=self.capacity.vocab_size)
            return list(prompt.token_ids), ()
        raw = prompt.text is not None and not do_preprocess
        messages: list[Any] = [{'role': 'user', 'content': prompt.text}] if prompt.messages is None else prompt.messages
        marked: Any = None
        if prompt.has_pictures:
            if self.pictures is None:
                raise RequestError('LMD-304')
            marked = self.pictures.mark(messages if prompt.text is None else prompt.text, prompt.images)
            messages = marked.messages
        self._refuse_huge(messages)
        # a raw prompt is the operator's own text: control tokens in it act
        if raw:
            segments, add_bos = [(messages[0]['content'], True)], sequence_start
        else:
            more = {'chat_template_kwargs': chat_template_kwargs} if chat_template_kwargs else {}
            segments = self.template.render(messages, sequence_start=sequence_start, tools=tools,
                                            enable_thinking=enable_thinking, **more)
            add_bos = sequence_start and self.template.add_bos
        if marked is not None:
            assert self.pictures is not None
            return self.pictures.assemble(segments, marked, add_bos)
        if raw:
            return self.tokenizer.encode(messages[0]['content'], add_bos=add_bos), ()
        return self.tokenizer.encode_segments(segments, add_bos=add_bos), ()

    def _refuse_huge(self, messages: list[Any]) -> None:
        chars = sum(map(_chars, messages))
        if chars > MAX_CHARS_PER_TOKEN * self.capacity.session_len:
            raise RequestError('LMD-307', chars=chars, session_len=self.capacity.session_len)

    async def generate(self, prompt: Prompt, gen: GenerationConfig, *, do_preprocess: bool = True,
                       tools: list[dict] | None = None, enable_thinking: bool | None = None, salt: bytes = b'',
                       name: str | None = None) -> AsyncGenerator[RequestOutput, None]:
        """Serve one request; with ``n > 1`` the outputs of its answers come interleaved, told apart by ``choice``.

        A failure of the request is an output with ``finish_reason='error'`` for each answer, not an exception.
        ``gen.n`` has been checked (:func:`lmdeploy.frontend.params.check`).
        """
        try:
            prepare = partial(self.prepare, prompt, gen, do_preprocess=do_preprocess, tools=tools,
                              enable_thinking=enable_thinking)
            # pictures are fetched, decoded and cut apart from the loop
            prepared = await asyncio.to_thread(prepare) if prompt.has_pictures else prepare()
            answers = await self.submit(prepared, salt=salt, name=name)
        except LmdeployError as error:
            for choice in range(gen.n):
                yield RequestOutput('', [], 0, 0, choice, 'error', error=error)
            return
        async with aclosing(answers):
            async for output in answers:
                yield output

    async def submit(self, prepared: Prepared, *, salt: bytes = b'', tenant: str = '',
                     name: str | None = None) -> AsyncGenerator[RequestOutput, None]:
        """Compile the grammar, if there is one, and return the answers of a prepared request.

        Args:
            salt: parts the prefix cache.
            tenant: tenants are served in turn, and share no cached blocks.
            name: unique; :meth:`abort` takes it.

        Raises:
            RequestError: LMD-325 to LMD-328.
        """
        grammars = await self._grammars(prepared)
        group = name or self.new_name()
        share = group if len(prepared.choices) > 1 else None
        inputs = [EngineInput(id=f'{group}.{i}', tokens=prepared.tokens, params=choice, salt=salt, tenant=tenant,
                              share=share, grammar=grammars[i], images=prepared.images)
                  for i, choice in enumerate(prepared.choices)]
        streams = [self._answer(request, prepared.rules, i) for i, request in enumerate(inputs)]
        return streams[0] if len(streams) == 1 else merge(streams)

    def new_name(self) -> str:
        """A name that no other request of this frontend has."""
        return f'r{next(self._ids)}'

    def abort(self, name: str, choices: int) -> None:
        """End the ``choices`` answers of a submitted request: each gets a last output with reason ``'abort'``."""
        for i in range(choices):
            self.client.abort(f'{name}.{i}')

    async def _grammars(self, prepared: Prepared) -> list[Grammar | None]:
        """One matcher per answer; compiled outside the event loop.

        Raises:
            RequestError: LMD-325 to LMD-328.
        """
        if prepared.grammar is None:
            return [None] * len(prepared.choices)
        compiled = await self.grammars.prepare(prepared.grammar)
        return [compiled.matcher(choice.stop_ids) for choice in prepared.choices]

    async def cross_entropy(self, token_ids: list[int]) -> float:
        """The mean cross-entropy, in nats, of the tokens after the first; summed up chunk by chunk.

        Raises:
            RequestError: too long for the context, or a token that is none.
        """
        import torch

        tokens = self.prepare(Prompt(token_ids=token_ids), GenerationConfig(max_new_tokens=0)).tokens
        request = EngineInput(id=f'r{next(self._ids)}.ppl', tokens=tokens,
                              params=SamplingParams(max_new_tokens=0, output_logits='all'))
        total, done = 0.0, 0
        async with aclosing(self.client.submit(request)) as stream:
            async for delta in stream:
                if delta.logits is not None:
                    rows = torch.as_tensor(np.array(delta.logits[:len(tokens) - 1 - done]))
                    targets = torch.tensor(tokens[done + 1:done + 1 + len(rows)], dtype=torch.long)
                    total += float(torch.nn.functional.cross_entropy(rows, targets, reduction='sum'))
                    done += len(delta.logits)
                if delta.finish is not None and delta.finish.error is not None:
                    raise delta.finish.error
        return total / (len(tokens) - 1)

    async def _answer(self, request: EngineInput, rules: params.TextRules,
                      choice: int) -> AsyncGenerator[RequestOutput, None]:
        text = AnswerText(Detokenizer(self.tokenizer, rules.skip_special_tokens, rules.spaces_between_special_tokens,
                                      continues=rules.continues),
                          StopFilter(rules.stops, rules.include_stop), request.params.min_new_tokens)
        prompt_len, want_logprobs = len(request.tokens), request.params.logprobs >= 0
        logits: list[Any] = []
        hidden: list[Any] = []
        generated = cached = 0

        def rows(pieces: list[Any], wanted: Rows) -> Any:
            """All rows; those of tokens that a stop text cut off are not part of the answer."""
            count = generated if wanted == 'generation' else prompt_len + max(generated - 1, 0)
            return _concat(pieces)[:count] if pieces and count else None

        stream = self.client.submit(request)
        try:
            async with aclosing(stream):
                async for delta in stream:
                    cached = max(cached, delta.cached_tokens)
                    if delta.logits is not None:
                        logits.append(delta.logits)
                    if delta.hidden is not None:
                        hidden.append(delta.hidden)
                    piece = text.push(delta.tokens, _token_logprobs(delta) if want_logprobs else None)
                    finish = delta.finish
                    reason: FinishReason | None = 'stop' if text.stopped else finish.reason if finish else None
                    if finish is not None and not text.stopped:
                        piece.extend(text.flush())
                    generated += len(piece.token_ids)
                    if not (piece.text or piece.token_ids or reason):
                        continue
                    last = reason is not None
                    yield RequestOutput(
                        piece.text, piece.token_ids, prompt_len, generated, choice, reason,
                        logprobs=piece.logprobs if want_logprobs else None,
                        logits=rows(logits, request.params.output_logits) if last else None,
                        hidden=rows(hidden, request.params.output_hidden) if last else None,
                        error=finish.error if finish else None, cached_tokens=cached, stop_text=text.stopped)
                    if last:
                        return
        except (RequestError, EngineDead) as error:
            yield RequestOutput('', [], prompt_len, generated, choice, 'error', error=error, cached_tokens=cached)


def _chars(message: Any) -> int:
    """Characters of all texts in a message, which may yet turn out to be no valid one."""
    found, parts = 0, [message]
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            found += len(part)
        elif isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, (list, tuple)):
            parts += part
    return found


@dataclass(slots=True)
class Piece:
    """Text that may be shown now, and the tokens whose text it completes."""

    text: str = ''
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)

    def extend(self, other: Piece) -> None:
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs


class AnswerText:
    """Turns an answer's tokens into text that never contains, nor ever takes back, a part of a stop text.

    Tokens are released together with their text: a token counts as part of the answer when some of its text does, so
    that text, token ids and log-probabilities are always cut at the same place. The text of the first ``min_tokens``
    tokens is not searched.
    """

    def __init__(self, detokenizer: Detokenizer, stops: StopFilter, min_tokens: int = 0) -> None:
        self.detokenizer, self.stops = detokenizer, stops
        self._unsearched = min_tokens
        self.stopped: str | None = None
        self._seen = 0  # characters detokenised
        self._shown = 0  # characters released
        self._held: deque[tuple[int, int, int, dict[int, float]]] = deque()  # (start, end, token, logprobs)

    def push(self, tokens: list[int], logprobs: list[dict[int, float]] | None = None) -> Piece:
        """Take new tokens; :attr:`stopped` is the stop text if one was met."""
        piece = Piece()
        for i, token in enumerate(tokens):
            if self.stopped is not None:
                break
            piece.extend(self._text(self.detokenizer.push([token]), token, logprobs[i] if logprobs else {}))
        return piece

    def flush(self) -> Piece:
        """The answer ended otherwise: release what was held back."""
        piece = self._text(self.detokenizer.flush(), None, {})
        if self.stopped is None:
            rest = self.stops.flush()
            self._shown += len(rest)
            piece.text += rest
            self._release(piece, everything=True)
        return piece

    def _text(self, new: str, token: int | None, logprobs: dict[int, float]) -> Piece:
        start, self._seen = self._seen, self._seen + len(new)
        if token is not None:
            self._held.append((start, self._seen, token, logprobs))
            self._unsearched -= 1
        if self._unsearched >= 0 and token is not None:
            shown = new
        else:
            shown, self.stopped = self.stops.push(new) if new else ('', None)
        self._shown += len(shown)
        piece = Piece(shown)
        self._release(piece, everything=False)
        return piece

    def _release(self, piece: Piece, *, everything: bool) -> None:
        while self._held:
            start, end, token, logprobs = self._held[0]
            # after a stop text, a token of which a part was shown belongs to the answer
            if not (everything or end <= self._shown or (self.stopped is not None and start < self._shown)):
                break
            self._held.popleft()
            piece.token_ids.append(token)
            piece.logprobs.append(logprobs)


def _token_logprobs(delta: TokenDelta) -> list[dict[int, float]]:
    """Per token ``{id: log-probability}``: the sampled token first, then the best in order."""
    got: Logprobs | None = delta.logprobs
    if got is None:
        return [{} for _ in delta.tokens]
    return [{token: float(got.chosen[i])} | {int(t): float(v) for t, v in zip(got.ids[i], got.values[i]) if t != token}
            for i, token in enumerate(delta.tokens)]


def _concat(pieces: list[Any]) -> Any:
    if len(pieces) <= 1:
        return pieces[0] if pieces else None
    if isinstance(pieces[0], np.ndarray):  # of an engine in another process
        return np.concatenate(pieces)
    import torch

    return torch.cat(pieces)


async def merge(streams: list[AsyncGenerator[Any, None]]) -> AsyncGenerator[Any, None]:
    """Interleave streams in the order in which items arrive; closing the result closes all of them."""
    queue: asyncio.Queue[tuple[Any, BaseException | None, bool]] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Any, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait((item, None, False))
        except BaseException as error:
            queue.put_nowait((None, error, True))
            if isinstance(error, asyncio.CancelledError):
                raise
        else:
            queue.put_nowait((None, None, True))

    tasks = [asyncio.ensure_future(pump(stream)) for stream in streams]
    running = len(tasks)
    try:
        while running:
            item, error, ended = await queue.get()
            if error is not None:
                raise error
            if ended:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""Pipeline: the synchronous face of the engine for scripts and notebooks.

Thread-safe: any number of threads may call it at once; all requests meet in the one engine and are batched there.
(The module is ``lmdeploy.pipe`` because ``lmdeploy.pipeline`` is the function that builds a Pipeline.)
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing
from typing import Any

from lmdeploy.errors import RequestError
from lmdeploy.frontend.bridge import LoopThread
from lmdeploy.frontend.frontend import AsyncFrontend, RequestOutput, merge
from lmdeploy.frontend.params import check
from lmdeploy.frontend.prompts import Prompt, classify
from lmdeploy.frontend.session import Session
from lmdeploy.log import get_logger
from lmdeploy.messages import GenerationConfig, GenOut, Response

GREEDY_WARNING = ('Since v0.6.0, lmdeploy add `do_sample` in GenerationConfig. It defaults to False, meaning greedy '
                  'decoding. Please set `do_sample=True` if sampling decoding is needed')
IN_FLIGHT = 4  # requests prepared and submitted ahead, as a multiple of the engine's batch size


class Pipeline:
    """Generates answers with one model. Build it with :func:`lmdeploy.pipeline`.

    Args:
        frontend: text to tokens and back, over an engine client.
        model_name: the name that the model goes by.
        backend: ``'turbomind'`` or ``'pytorch'``: under which of its two names the engine was configured.
        backend_config: the public config that it was built with.
        stop: releases the engine; called once.
    """

    def __init__(self, frontend: AsyncFrontend, *, model_name: str, backend: str, backend_config: Any,
                 stop: Callable[[], None]) -> None:
        self.frontend = frontend
        self.model_name = model_name
        self.backend = backend
        self.backend_config = backend_config
        self._loop = LoopThread()
        self._sessions = itertools.count(1)
        self._running: dict[int, tuple[str, int]] = {}  # session id -> its request's name and number of answers
        self._release = weakref.finalize(self, _release, self._loop.close, stop, frontend.grammars.close)  # at exit too

    @property
    def tokenizer(self) -> Any:
        return self.frontend.tokenizer

    @property
    def chat_template(self) -> Any:
        return self.frontend.template

    @property
    def engine(self) -> Any:
        return self.frontend.client

    @property
    def session_len(self) -> int:
        return self.frontend.capacity.session_len

    @property
    def stop_words(self) -> list[str]:
        return list(self.frontend.template.stop_words)

    def __call__(self, prompts: Any, gen_config: GenerationConfig | list[GenerationConfig] | None = None,
                 do_preprocess: bool = True, adapter_name: str | None = None,
                 use_tqdm: bool = False) -> Response | list[Response]:
        """Answer one prompt or a batch.

        Args:
            prompts: a text, a list of messages or a list of token ids; or a list of these.
            gen_config: one for all prompts, or a list with one for each.
            do_preprocess: apply the chat template; False takes texts as they are.
            adapter_name: not supported.
            use_tqdm: show a progress bar.

        Returns:
            A Response for a single prompt, a list in the order of the prompts for a batch (and for ``n > 1``, with the
            n answers of a prompt side by side). A prompt that fails gives a Response with ``finish_reason='error'``,
            ``error_code`` and ``error_message``.

        Raises:
            RequestError: ``gen_config`` is not usable, or the pipeline is closed.
        """
        requests, single, width = self._requests(prompts, gen_config, adapter_name)
        answers: list[Response | None] = [None] * (len(requests) * width)
        with _progress(len(answers), use_tqdm) as advance:
            for piece in self._loop.iterate(self._stream(requests, width, do_preprocess)):
                whole = answers[piece.index]
                answers[piece.index] = piece if whole is None else _joined(whole, piece)
                if piece.finish_reason is not None:
                    advance()
        done = [answer for answer in answers if answer is not None]
        return done[0] if single and width == 1 else done

    infer = batch_infer = __call__

    def stream_infer(self, prompts: Any, gen_config: GenerationConfig | list[GenerationConfig] | None = None,
                     do_preprocess: bool = True, adapter_name: str | None = None) -> Iterator[Response]:
        """Answer in pieces: an iterator of Responses whose ``text`` and ``token_ids`` are what is new.

        The pieces of a batch come interleaved; ``index`` tells which prompt (for ``n > 1``: prompt * n + answer) one
        belongs to, and its last piece has a ``finish_reason``. Closing the iterator stops what still runs.
        """
        requests, _, width = self._requests(prompts, gen_config, adapter_name)
        return self._loop.iterate(self._stream(requests, width, do_preprocess))

    def chat(self, prompt: Any, session: Session | None = None, gen_config: GenerationConfig | None = None,
             stream_response: bool = False, do_preprocess: bool = True, adapter_name: str | None = None) -> Session:
        """One turn of a conversation. A turn of the session that still runs is stopped; what it said so far stays.

        Returns:
            The session (a new one where none was given): ``session.response`` is the answer, and with
            ``stream_response=True`` ``session.generator`` gives its pieces.

        Raises:
            RequestError: ``prompt`` is not one text or list of messages, or ``gen_config`` asks for several answers.
        """
        session = self.session(gen_config) if session is None else session
        if not isinstance(session, Session):
            raise RequestError('LMD-303', given=f'session={session!r}'[:80])
        gen_config = gen_config or session._gen_config
        _check_turn(prompt, gen_config)
        session.stop()
        pieces = self.stream_infer(session.messages(prompt), gen_config=gen_config,
                                   do_preprocess=do_preprocess, adapter_name=adapter_name)
        session.begin(prompt)
        session.generator = _turn(session, pieces)
        if not stream_response:
            for _ in session.generator:
                pass
        return session

    def session(self, gen_config: GenerationConfig | None = None) -> Session:
        """A new, empty conversation."""
        return Session(next(self._sessions), self.chat, gen_config)

    def get_ppl(self, input_ids: list[int] | list[list[int]]) -> list[float]:
        """The mean cross-entropy, in nats per token, of each sequence of two tokens or more (not exponentiated)."""
        prompts, _ = classify(input_ids)
        sequences = [prompt.token_ids or [] for prompt in prompts if isinstance(prompt, Prompt)]
        if len(sequences) < max(len(prompts), 1) or not all(len(ids) > 1 for ids in sequences):
            raise RequestError('LMD-303', given='input_ids without two tokens in each sequence')
        return self._loop.run(self._cross_entropies(sequences))

    def get_reward_score(self, input_ids: Any) -> list[float]:
        """Not supported: no reward model has been added yet."""
        raise RequestError('LMD-317', method='get_reward_score', what='a reward model')

    async def generate(self, messages: Any = None, session_id: int = 0, gen_config: GenerationConfig | None = None,
                       tools: list[dict] | None = None, stream_response: bool = True, sequence_start: bool = True,
                       sequence_end: bool = True, step: int = 0, do_preprocess: bool = True,
                       adapter_name: str | None = None, input_ids: list[int] | None = None,
                       enable_thinking: bool | None = None) -> AsyncGenerator[GenOut, None]:
        """Answer in the caller's own event loop: an async iterator of pieces (or, not streaming, of whole answers).

        Nothing of a session stays in the engine between its turns: each call brings the whole conversation as
        ``messages``, and ``sequence_start=False`` or a ``step`` is refused.
        """
        self._loop.check()
        _refuse_adapter(adapter_name)
        if not sequence_start or step:
            raise RequestError('LMD-313', field='step' if sequence_start else 'sequence_start')
        gen_config = gen_config or GenerationConfig()
        check(gen_config, self.frontend.capacity.vocab_size)
        prompt = _one(messages if input_ids is None else input_ids)
        if session_id in self._running:
            raise RequestError('LMD-318', session_id=session_id)
        name = self.frontend.new_name()
        if session_id:
            self._running[session_id] = (name, gen_config.n)
        stream = self.frontend.generate(prompt, gen_config, do_preprocess=do_preprocess, tools=tools,
                                        enable_thinking=enable_thinking, name=name)
        whole: dict[int, Response] = {}
        try:
            async with aclosing(stream):
                async for output in stream:
                    piece = _response(output, output.choice)
                    if stream_response:
                        yield _gen_out(piece)
                    else:
                        so_far = whole.get(piece.index)
                        whole[piece.index] = piece if so_far is None else _joined(so_far, piece)
            for answer in whole.values():
                yield _gen_out(answer)
        finally:
            if session_id and self._running.get(session_id, ('', 0))[0] == name:
                del self._running[session_id]

    async def stop_session(self, session_id: int) -> None:
        """Stop what ``generate(session_id=...)`` runs: its last piece has ``finish_reason='abort'``."""
        if session_id in self._running:
            self.frontend.abort(*self._running[session_id])

    async def end_session(self, session_id: int) -> None:
        """The same: a session holds nothing of the engine between its turns."""
        await self.stop_session(session_id)

    def close(self) -> None:
        """Stop the engine and free its memory; safe to call twice."""
        self._release()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _requests(self, prompts: Any, gen_config: Any, adapter_name: str | None
                  ) -> tuple[list[tuple[Prompt | RequestError, GenerationConfig]], bool, int]:
        _refuse_adapter(adapter_name)
        parsed, single = classify(prompts)
        configs = gen_config if isinstance(gen_config, (list, tuple)) else [
            gen_config or GenerationConfig()] * len(parsed)
        if len(configs) != len(parsed):
            raise RequestError('LMD-306', prompts=len(parsed), configs=len(configs))
        for config in configs:
            check(config, self.frontend.capacity.vocab_size)
        if any(not config.do_sample for config in configs):
            get_logger().warning(GREEDY_WARNING)
        width = max((config.n for config in configs), default=1)
        return list(zip(parsed, configs)), single, width

    async def _stream(self, requests: Sequence[tuple[Prompt | RequestError, GenerationConfig]], width: int,
                      do_preprocess: bool) -> AsyncGenerator[Response, None]:
        gate = asyncio.Semaphore(IN_FLIGHT * self.frontend.capacity.max_batch_size)

        async def one(i: int, prompt: Prompt | RequestError,
                      config: GenerationConfig) -> AsyncGenerator[Response, None]:
            async with gate:
                if isinstance(prompt, RequestError):
                    for choice in range(config.n):
                        yield _response(RequestOutput('', [], 0, 0, choice, 'error', error=prompt), i * width + choice)
                    return
                stream = self.frontend.generate(prompt, config, do_preprocess=do_preprocess)
                async with aclosing(stream):
                    async for output in stream:
                        yield _response(output, i * width + output.choice)

        streams = [one(i, *request) for i, request in enumerate(requests)]
        merged = streams[0] if len(streams) == 1 else merge(streams)
        async with aclosing(merged):
            async for response in merged:
                yield response

    async def _cross_entropies(self, sequences: list[list[int]]) -> list[float]:
        return [await self.frontend.cross_entropy(ids) for ids in sequences]


def _release(*stops: Callable[[], None]) -> None:
    with ExitStack() as stack:  # one that fails does not keep the others from running
        for stop in reversed(stops):
            stack.callback(stop)


def _refuse_adapter(adapter_name: str | None) -> None:
    if adapter_name is not None:
        raise RequestError('LMD-313', field='adapter_name')


def _one(prompts: Any) -> Prompt:
    """The only prompt of ``prompts``."""
    parsed, single = classify(prompts)
    if not single:
        raise RequestError('LMD-319', given=f'a batch of {len(parsed)}')
    if isinstance(parsed[0], RequestError):
        raise parsed[0]
    return parsed[0]


def _check_turn(prompt: Any, gen_config: GenerationConfig | None) -> None:
    """Refuse what is not one turn of a conversation with one answer."""
    if _one(prompt).token_ids is not None:
        raise RequestError('LMD-319', given='a list of token ids')
    if isinstance(gen_config, GenerationConfig) and gen_config.n != 1:
        raise RequestError('LMD-319', given=f'n={gen_config.n}')


def _turn(session: Session, pieces: Iterator[Response]) -> Iterator[Response]:
    whole: Response | None = None
    try:
        for piece in pieces:
            whole = piece if whole is None else _joined(whole, piece)
            yield piece
    finally:
        pieces.close()  # type: ignore[attr-defined]
        if whole is not None:  # a turn that was stopped half-way keeps what was said
            session.finish(whole)


def _response(output: RequestOutput, index: int) -> Response:
    error = output.error
    return Response(output.text, output.generated_len, output.input_len, output.finish_reason, output.token_ids,
                    output.logprobs, output.logits, output.hidden, index, error.code if error else None,
                    str(error) if error else None, output.cached_tokens)


def _joined(whole: Response, piece: Response) -> Response:
    """``whole`` with one more piece, which carries the latest counts and outcome."""
    logprobs = None if piece.logprobs is None else (whole.logprobs or []) + piece.logprobs
    return Response(whole.text + piece.text, piece.generate_token_len, piece.input_token_len, piece.finish_reason,
                    whole.token_ids + piece.token_ids, logprobs, piece.logits, piece.last_hidden_state, piece.index,
                    piece.error_code, piece.error_message, piece.cached_tokens)


def _gen_out(piece: Response) -> GenOut:
    return GenOut(piece.text, 0, piece.input_token_len, piece.generate_token_len, piece.finish_reason, piece.token_ids,
                  piece.logprobs, piece.logits, piece.last_hidden_state, None, piece.index, piece.error_code,
                  piece.error_message)


class _progress:
    """A progress bar over the answers of a batch, or nothing."""

    def __init__(self, total: int, shown: bool) -> None:
        self.total, self.shown = total, shown
        self.bar: Any = None

    def __enter__(self) -> Callable[[], None]:
        if not self.shown:
            return lambda: None
        from rich.console import Console
        from rich.progress import Progress

        self.bar = Progress(console=Console(stderr=True))
        task = self.bar.add_task('answers', total=self.total)
        self.bar.start()
        return lambda: self.bar.advance(task)

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()

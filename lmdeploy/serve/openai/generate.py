"""``POST /generate``: one prompt, one answer, with its tokens and what the engine says of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from lmdeploy.frontend.frontend import RequestOutput
from lmdeploy.frontend.prompts import Prompt
from lmdeploy.messages import GenerationConfig
from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.generation import Work, generate
from lmdeploy.serve.http import Request, Response, Stream, json_reply
from lmdeploy.serve.limits import Limits
from lmdeploy.serve.openai.answers import GenerateAnswer, GenerateMeta
from lmdeploy.serve.openai.convert import finite, or_default, ranked, stop_ids, stop_texts
from lmdeploy.serve.openai.protocol import GenerateRequest
from lmdeploy.serve.sse import DONE, error_event, event


class Generate:
    """The handler, over a server's context."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    async def __call__(self, body: GenerateRequest, request: Request) -> Response:
        context = self.context
        request.model = context.model_names[0]
        work = _work(body, context.limits)
        pieces = self._pieces(request, body, work)
        if body.stream:
            return Stream(_events(pieces), lambda error: error_event(error, request.id))
        text, ids = '', []
        scores: list[tuple[float, int]] = []
        tops: list[list[tuple[float, int]]] = []
        meta = None
        async for piece in pieces:
            text, meta = text + piece.text, piece.meta_info
            ids += piece.output_ids
            scores += meta.output_token_logprobs or ()
            tops += meta.output_top_logprobs or ()
        assert meta is not None
        if meta.output_token_logprobs is not None:
            meta.output_token_logprobs = scores
        if meta.output_top_logprobs is not None:
            meta.output_top_logprobs = tops
        return json_reply(GenerateAnswer(text=text, output_ids=ids, meta_info=meta))

    async def _pieces(self, request: Request, body: GenerateRequest,
                      work: Work) -> AsyncGenerator[GenerateAnswer, None]:
        async with generate(self.context, request, [work], session_id=body.session_id) as answers:
            async for output in answers.outputs:
                yield GenerateAnswer(text=output.text, output_ids=output.token_ids,
                                     meta_info=_meta(request.id, output, body.top_logprobs_num))


async def _events(pieces: AsyncGenerator[GenerateAnswer, None]) -> AsyncGenerator[bytes, None]:
    try:
        async for piece in pieces:
            yield event(piece)
        yield DONE
    finally:
        await pieces.aclose()


def _meta(request_id: str, output: RequestOutput, top: int | None) -> GenerateMeta:
    meta = GenerateMeta(id=request_id, prompt_tokens=output.input_len, completion_tokens=output.generated_len,
                        cached_tokens=output.cached_tokens,
                        finish_reason=None if output.finish_reason is None else {'type': output.finish_reason})
    if output.logprobs is not None:
        entries = [entry for entry in output.logprobs if entry]
        meta.output_token_logprobs = [(finite(value), token) for token, value in
                                      (next(iter(entry.items())) for entry in entries)]
        if top:
            meta.output_top_logprobs = [[(finite(value), token) for token, value in ranked(entry, top)]
                                        for entry in entries]
    return meta


def _work(body: GenerateRequest, limits: Limits) -> Work:
    if (body.prompt is None) == (body.input_ids is None):
        raise HttpError('LMD-512', param='prompt', reason='give either prompt or input_ids')
    limits.check('max_tokens', body.max_tokens or 0, 'max_tokens')
    limits.check('logprobs', body.top_logprobs_num or 0, 'top_logprobs_num')
    if body.top_logprobs_num and not body.return_logprob:
        raise HttpError('LMD-512', param='top_logprobs_num', reason='it needs return_logprob to be true')
    gen = GenerationConfig(
        do_sample=True, max_new_tokens=or_default(body.max_tokens, 128), temperature=or_default(body.temperature, 1.0),
        top_p=or_default(body.top_p, 1.0), top_k=or_default(body.top_k, 0), min_p=or_default(body.min_p, 0.0),
        repetition_penalty=or_default(body.repetition_penalty, 1.0),
        presence_penalty=or_default(body.presence_penalty, 0.0),
        frequency_penalty=or_default(body.frequency_penalty, 0.0), random_seed=body.seed,
        stop_words=stop_texts(body.stop, limits), stop_token_ids=stop_ids(body.stop_token_ids, limits),
        min_new_tokens=body.min_new_tokens, ignore_eos=or_default(body.ignore_eos, False),
        skip_special_tokens=or_default(body.skip_special_tokens, True),
        spaces_between_special_tokens=or_default(body.spaces_between_special_tokens, True),
        include_stop_str_in_output=or_default(body.include_stop_str_in_output, False),
        logprobs=(body.top_logprobs_num or 0) if body.return_logprob else None)
    return Work(Prompt(text=body.prompt, token_ids=body.input_ids), gen, do_preprocess=False)

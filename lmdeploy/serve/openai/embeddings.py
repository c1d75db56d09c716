"""``POST /v1/embeddings``: one vector per input.

An encoder's is what its own files say (see :class:`lmdeploy.config.encoder.Pooling`), a decoder's is the hidden state
of the input's last token, at length 1.
"""

from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np

from lmdeploy.messages import GenerationConfig
from lmdeploy.serve.context import ServerContext
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.generation import Work, generate
from lmdeploy.serve.http import Request, Response, json_reply
from lmdeploy.serve.openai.answers import Embedding, EmbeddingList, EmbeddingUsage
from lmdeploy.serve.openai.convert import raw_prompts
from lmdeploy.serve.openai.protocol import EmbeddingRequest

POOL = GenerationConfig(max_new_tokens=1, output_last_hidden_state='generation', ignore_eos=True)
"""For a decoder: the one generated token is drawn from the last position of the input, and of that position alone comes
a row."""


class Embeddings:
    """The handler, over a server's context."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    async def __call__(self, body: EmbeddingRequest, request: Request) -> Response:
        context = self.context
        request.model = body.model
        context.check_model(body.model)
        works = [Work(prompt, replace(POOL), do_preprocess=False, pooled=True)
                 for prompt in raw_prompts(body.input, context.limits, 'input')]
        rows: list[np.ndarray] = [np.zeros(0)] * len(works)
        async with generate(context, request, works) as answers:
            async for output in answers.outputs:
                if output.hidden is not None:
                    rows[output.choice] = np.asarray(output.hidden)[-1]
            prompt_tokens = answers.usage.prompt
        width = min(len(row) for row in rows)
        if body.dimensions is not None and body.dimensions > width:
            raise HttpError('LMD-512', param='dimensions', reason=f'the model has {width}')
        pooling = context.frontend_loaded().capacity.pooling
        unit = pooling is None or pooling.normalise
        data = [Embedding(index=i, embedding=_spell(_cut(row, body.dimensions, unit), body.encoding_format == 'base64'))
                for i, row in enumerate(rows)]
        return json_reply(EmbeddingList(data=data, model=body.model,
                                        usage=EmbeddingUsage(prompt_tokens, prompt_tokens)))


def _cut(row: np.ndarray, dimensions: int | None, unit: bool) -> np.ndarray:
    row = row[:dimensions]
    if not unit:
        return row.astype('<f4')
    length = float(np.linalg.norm(row.astype(np.float64)))
    return (row / (length or 1.0)).astype('<f4')


def _spell(row: np.ndarray, as_base64: bool) -> list[float] | str:
    return base64.b64encode(row.tobytes()).decode() if as_base64 else row.tolist()

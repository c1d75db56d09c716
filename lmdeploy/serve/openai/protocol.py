"""Bodies of OpenAI's and LMDeploy's requests, as types (:mod:`lmdeploy.serve.body` has the rule for every field).

Sizes are checked against :class:`lmdeploy.serve.limits.Limits` by :mod:`lmdeploy.serve.openai.convert`; ranges of
numbers stand here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lmdeploy.serve.body import ELSEWHERE, Body, Many, Probability, Refusals, Token

SEED = 1 << 63
IMAGES = 'only text and pictures are read here'
IN_PARTS = 'pictures are content parts of messages, with their options'
REFUSED: Refusals = {
    'suffix': ((), 'filling in between two texts is not possible here'),
    'best_of': ((1,), 'ask for n answers and choose yourself'),
    'min_tokens': ((0,), 'use min_new_tokens'),
    'bad_words': (([],), 'use logit_bias'),
    'use_beam_search': ((False,), 'answers are sampled'),
    'functions': (([],), 'use tools'),
    'function_call': ((), 'use tool_choice'),
    'modalities': ((['text'],), 'answers are text'),
    'audio': ((), 'answers are text'),
    'store': ((False,), 'nothing is stored'),
    'service_tier': (('auto', 'default'), 'there is one tier'),
    'web_search_options': ((), ELSEWHERE),
    'prompt_logprobs': ((), 'use logprobs for the answer'),
    'logprob_start_len': ((-1,), 'only the answer has log-probabilities'),
    'return_logprob': ((False,), 'use logprobs and top_logprobs'),
    'return_routed_experts': ((False,), ELSEWHERE),
    'repetition_ngram_size': ((0,), ELSEWHERE),
    'repetition_ngram_threshold': ((0,), ELSEWHERE),
    'migration_request': ((), ELSEWHERE),
    'with_cache': ((False,), ELSEWHERE),
    'preserve_cache': ((False,), ELSEWHERE),
    'adapter_name': ((), ELSEWHERE),
    'image_url': ((), IN_PARTS),
    'image_data': ((), IN_PARTS),
    'media_io_kwargs': (({},), IN_PARTS),
    'mm_processor_kwargs': (({},), IN_PARTS),
    'guided_json': ((), 'use response_format'),
    'guided_regex': ((), 'use response_format'),
    'guided_choice': ((), 'use response_format'),
    'guided_grammar': ((), 'use response_format'),
}
"""Known fields that this version does not have."""
NO_EFFECT = frozenset({'metadata', 'safety_identifier', 'prompt_cache_key', 'prompt_cache_retention', 'verbosity',
                       'prediction'})
"""Known fields that are wishes or labels, and change no answer."""


class RequestBody(Body):
    """A whole body, as opposed to a part of one."""

    refused = REFUSED
    no_effect = NO_EFFECT


class Message(Body):
    """One message of a conversation. Its further keys reach the chat template."""

    role: str
    content: str | Many[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: Many[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Function(Body):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal['function'] = 'function'
    function: Function


class FunctionName(Body):
    name: str = Field(min_length=1, max_length=256)


class NamedTool(Body):
    type: Literal['function'] = 'function'
    function: FunctionName


class AllowedTools(Body):
    mode: Literal['auto', 'required'] = 'auto'
    tools: Many[NamedTool]


class AllowedToolsChoice(Body):
    type: Literal['allowed_tools']
    allowed_tools: AllowedTools


class Sampling(RequestBody):
    """What all generating requests share. The defaults are LMDeploy's."""

    model: str
    temperature: float | None = Field(0.7, ge=0, le=2)
    top_p: Probability | None = 1.0
    top_k: int | None = Field(40, ge=0, description='0 is off')
    min_p: float | None = Field(0.0, ge=0, le=1)
    n: int | None = Field(1, ge=1)
    seed: int | None = Field(None, ge=-SEED, lt=2 * SEED)
    stop: str | Many[str] | None = None
    stop_token_ids: Many[Token] | None = None
    max_tokens: int | None = Field(None, ge=1)
    min_new_tokens: int | None = Field(None, ge=0)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(1.0, ge=0.001, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False
    response_format: dict[str, Any] | None = None
    return_token_ids: bool | None = False
    session_id: int | None = Field(-1, ge=-1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``. ``messages`` as a text is a raw prompt, without chat template."""

    messages: str | Many[Message] = Field(default_factory=list)
    input_ids: Many[Token] | None = Field(None, description='the prompt as tokens, in place of messages')
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: Many[Tool] | None = None
    tool_choice: Literal['auto', 'none', 'required'] | NamedTool | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = True
    enable_thinking: bool | None = None
    reasoning_effort: Literal['none', 'minimal', 'low', 'medium', 'high', 'max'] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Sampling):
    """``POST /v1/completions``: raw prompts, without chat template; one choice per prompt and answer."""

    prompt: str | Many[str] | Many[Token] | Many[Many[Token]]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0)
    echo: bool | None = False


class GenerateRequest(RequestBody):
    """``POST /generate``: one prompt as text or tokens, one answer with its tokens."""

    prompt: str | None = None
    input_ids: Many[Token] | None = None
    max_tokens: int | None = Field(128, ge=1)
    stop: str | Many[str] | None = None
    stop_token_ids: Many[Token] | None = None
    stream: bool | None = False
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: Probability | None = 1.0
    top_k: int | None = Field(0, ge=0)
    min_p: float | None = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-SEED, lt=2 * SEED)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(1.0, ge=0.001, le=10)
    min_new_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False
    return_logprob: bool | None = False
    top_logprobs_num: int | None = Field(None, ge=0)
    session_id: int | None = Field(-1, ge=-1)


class InteractiveRequest(RequestBody):
    """``POST /v1/chat/interactive``: with ``interactive_mode`` the server remembers the conversation."""

    prompt: str | Many[Message] = ''
    session_id: int = Field(-1, ge=-1)
    interactive_mode: bool = False
    stream: bool = False
    stop: str | Many[str] | None = None
    request_output_len: int | None = Field(None, ge=0)
    top_p: Probability = 0.8
    top_k: int = Field(40, ge=0)
    temperature: float = Field(0.8, ge=0, le=2)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.001, le=10)
    ignore_eos: bool = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    cancel: bool | None = False
    seed: int | None = Field(None, ge=-SEED, lt=2 * SEED)
    min_new_tokens: int | None = Field(None, ge=0)


class EncodeRequest(RequestBody):
    """``POST /v1/encode``: texts to tokens; ``do_preprocess`` puts each into the chat template as a user's turn."""

    model: str | None = None
    input: str | Many[str]
    do_preprocess: bool | None = False
    add_bos: bool | None = True


class TokenizeRequest(RequestBody):
    """``POST /tokenize``: a text, or a conversation as the chat template renders it."""

    model: str | None = None
    prompt: str | None = None
    messages: Many[Message] | None = None
    tools: Many[Tool] | None = None
    add_special_tokens: bool | None = True
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(RequestBody):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Many[Token]
    skip_special_tokens: bool | None = False


class EmbeddingRequest(RequestBody):
    """``POST /v1/embeddings``: texts as vectors, a model's own way of pooling, or the last token's hidden state."""

    model: str
    input: str | Many[str] | Many[Token] | Many[Many[Token]]
    encoding_format: Literal['float', 'base64'] | None = 'float'
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None


class AbortRequest(RequestBody):
    """``POST /abort_request``: end running requests of one's own; ``abort_all`` needs an admin key for all of them."""

    session_id: int | None = Field(None, ge=0)
    request_id: str | None = None
    abort_all: bool | None = False

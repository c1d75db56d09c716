"""Bodies of responses, as structures that are encoded directly to bytes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Finish = Literal['stop', 'length', 'tool_calls', 'abort']


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class ReasoningTokens(msgspec.Struct):
    reasoning_tokens: int


class UsageInfo(msgspec.Struct):
    """Tokens of a request; the prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class TopLogprob(msgspec.Struct):
    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(msgspec.Struct):
    """A generated token and the best alternatives; ``bytes`` of all tokens are the answer."""

    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]


class FunctionCall(msgspec.Struct, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallInfo(msgspec.Struct, kw_only=True):
    id: str
    type: str = 'function'
    function: FunctionCall


class ToolCallDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    index: int = msgspec.field()
    id: str | None = None
    type: str | None = None
    function: FunctionCall


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str = 'assistant'
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallInfo] | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    """What is new in a message; keys that bring nothing are left out."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: str = 'chat.completion'
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageInfo
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: str = 'chat.completion.chunk'
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageInfo | None | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class CompletionLogprobs(msgspec.Struct):
    """Four lists of one length."""

    text_offset: list[int] = msgspec.field(default_factory=list)
    token_logprobs: list[float] = msgspec.field(default_factory=list)
    tokens: list[str] = msgspec.field(default_factory=list)
    top_logprobs: list[dict[str, float]] = msgspec.field(default_factory=list)


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, kw_only=True):
    """A completion, and while streaming a piece of one."""

    id: str
    object: str = 'text_completion'
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageInfo | None | msgspec.UnsetType = msgspec.UNSET


class ModelPermission(msgspec.Struct, kw_only=True):
    id: str
    object: str = 'model_permission'
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = True
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = '*'
    group: str | None = None
    is_blocking: bool = False


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: str = 'model'
    created: int
    owned_by: str = 'lmdeploy'
    root: str
    parent: str | None = None
    permission: list[ModelPermission]
    max_model_len: int | None = None


class ModelList(msgspec.Struct, kw_only=True):
    object: str = 'list'
    data: list[ModelCard]


class GenerateMeta(msgspec.Struct, kw_only=True):
    id: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    finish_reason: dict[str, Any] | None
    output_token_logprobs: list[tuple[float, int]] | None = None
    output_top_logprobs: list[list[tuple[float, int]]] | None = None


class GenerateAnswer(msgspec.Struct, kw_only=True):
    """An answer of ``/generate``; while streaming, ``text`` and ``output_ids`` are what is new."""

    text: str
    output_ids: list[int]
    meta_info: GenerateMeta


class InteractiveAnswer(msgspec.Struct):
    """An answer of ``/v1/chat/interactive``, or a piece of one."""

    text: str
    tokens: int
    input_tokens: int
    history_tokens: int
    finish_reason: str | None


class Encoded(msgspec.Struct):
    """For one text its tokens and their number, for several texts lists of these."""

    input_ids: list[int | list[int]]
    length: int | list[int]


class Tokenized(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(msgspec.Struct):
    prompt: str


class Embedding(msgspec.Struct, kw_only=True):
    object: str = 'embedding'
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True):
    object: str = 'list'
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage

"""The public dataclasses: what users hand in and get back. Names, order and defaults are LMDeploy's."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal['stop', 'length', 'abort', 'error']
LogitsProcessor = Callable[[Any, Any], Any]
"""``(token_ids: Tensor[n], logits: Tensor[vocab]) -> Tensor[vocab]``: a user's own change to one request's logits."""


@dataclass
class GenerationConfig:
    """How one answer is generated.

    Args:
        n: how many answers; with more than one, the ``Response`` list of a prompt is flat, one entry per answer.
        max_new_tokens: at most this many generated tokens; None: up to the session's length.
        do_sample: False (the default) is greedy decoding, whatever the sampling parameters say.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keep the k most probable tokens; 0 is off.
        min_p: drop tokens less probable than this share of the most probable one, in [0, 1].
        temperature: divides the logits, in [0, 2]; 0, and all below 1e-5, is greedy.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen so far, in [0.001, 10].
        ignore_eos: never end before ``max_new_tokens``: end tokens are not sampled at all.
        random_seed: same seed, same answer, whatever else is in the batch; None draws one.
        stop_words: texts that end the answer, of any length; they are not part of it.
        bad_words: texts that must not appear.
        stop_token_ids: tokens that end the answer.
        bad_token_ids: tokens that are never sampled.
        min_new_tokens: end tokens are not sampled, and stop words not looked for, in this many tokens.
        skip_special_tokens: leave control tokens out of the text.
        spaces_between_special_tokens: put spaces between control tokens in the text.
        logprobs: the k best log-probabilities per generated token, in [0, 1024].
        response_format: what the answer looks like: ``{'type': 'json_object'}``, ``'json_schema'`` with a schema, or
            ``'regex_schema'`` with a regular expression; None or ``{'type': 'text'}``: any text.
        logits_processors: functions of the caller's that change the logits of each step.
        output_logits: ``'all'`` (prompt and answer) or ``'generation'`` rows of logits in the response.
        output_last_hidden_state: the same for the last hidden state.
        with_cache, preserve_cache, migration_request: disaggregated serving; not supported.
        include_stop_str_in_output: keep the stop text that ended the answer.
        presence_penalty: subtracted once from the logit of each generated token, in [-2, 2].
        frequency_penalty: subtracted from it as often as it was generated, in [-2, 2].
        logit_bias: added to the logits of these tokens, each in [-100, 100].
        return_ppl, return_routed_experts, repetition_ngram_size, repetition_ngram_threshold, logprob_start_len: of
            newer LMDeploy versions; not supported.
    """

    n: int = 1
    max_new_tokens: int | None = 512
    do_sample: bool = False
    top_p: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_words: list[str] | None = None
    bad_words: list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_token_ids: list[int] | None = None
    min_new_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    response_format: dict | None = None
    logits_processors: list[LogitsProcessor] | None = None
    output_logits: Literal['all', 'generation'] | None = None
    output_last_hidden_state: Literal['all', 'generation'] | None = None
    with_cache: bool = False
    preserve_cache: bool = False
    migration_request: Any = None
    include_stop_str_in_output: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    return_ppl: bool = False
    return_routed_experts: bool = False
    repetition_ngram_size: int = 0
    repetition_ngram_threshold: int = 0
    logprob_start_len: int = -1

    def convert_stop_bad_words_to_ids(self, tokenizer: Any) -> None:
        """Add to ``stop_token_ids`` and ``bad_token_ids`` the tokens that are stop and bad words.

        Nothing needs it: words of any length are found in the text. It is there for callers that want the ids.
        """
        for words, ids in (('stop_words', 'stop_token_ids'), ('bad_words', 'bad_token_ids')):
            found = [token for word in getattr(self, words) or () for token in tokenizer.indexes_containing_token(word)]
            if found:
                setattr(self, ids, sorted({*(getattr(self, ids) or ()), *found}))

    def update_from_hf_gen_cfg(self, generation_config: dict[str, Any], tokenizer_eos_token_id: int | None) -> None:
        """Add to ``stop_token_ids`` the end tokens of the tokenizer and of a generation_config.json."""
        given = generation_config.get('eos_token_id')
        ends = {*(given if isinstance(given, (list, tuple)) else (given,)), tokenizer_eos_token_id} - {None}
        if ends:
            self.stop_token_ids = sorted({*(self.stop_token_ids or ()), *ends})


@dataclass
class TurbomindEngineConfig:
    """Engine options under TurboMind's names: selects the graph runner of the one engine.

    Which fields act, which are hints and which are refused is the table of :mod:`lmdeploy.config.options`. Our own are
    ``lm_head_dtype`` (``'int8'``, ``'fp8'``: the output head in 8 bits) and ``exact_weights`` (the weights of GGUF
    files are dequantised when they load, where they would stay quantised and some be rounded to 8 bits).
    """

    dtype: str = 'auto'
    model_format: str | None = None
    tp: int = 1
    dp: int = 1
    device_num: int | None = None
    attn_tp_size: int | None = None
    attn_dp_size: int | None = None
    mlp_tp_size: int | None = None
    mlp_dp_size: int | None = None
    outer_dp_size: int | None = None
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float = 0.8
    cache_chunk_size: int = -1
    cache_block_seq_len: int = 64
    enable_prefix_caching: bool = False
    quant_policy: int = 0
    rope_scaling_factor: float = 0.0
    use_logn_attn: bool = False
    download_dir: str | None = None
    revision: str | None = None
    max_prefill_token_num: int = 8192
    num_tokens_per_iter: int = 0
    max_prefill_iters: int = 1
    devices: list[int] | None = None
    empty_init: bool = False
    communicator: str = 'nccl'
    cp: int = 1
    ep: int = 1
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    enable_metrics: bool = True
    hf_overrides: dict | None = None
    attn_cp_size: int | None = None
    cache_checkpoint_interval: int = 4096
    cache_prompt: str = 'auto'
    cache_prompt_boundary_skip: int = 1
    cache_generation: str = 'auto'
    async_: int = 1
    language_model_only: bool = False
    gemm_input_dtype: str | None = None
    moe_a2a_backend: str = 'auto'
    lm_head_dtype: str = 'auto'
    exact_weights: bool = False


@dataclass
class PytorchEngineConfig:
    """Engine options under the PyTorch engine's names: the same engine, with ``eager_mode`` and ``device_type``.

    Which fields act, which are hints and which are refused is the table of :mod:`lmdeploy.config.options`. Our own are
    ``lm_head_dtype`` (``'int8'``, ``'fp8'``: the output head in 8 bits) and ``exact_weights`` (the weights of GGUF
    files are dequantised when they load, where they would stay quantised and some be rounded to 8 bits).
    """

    dtype: str = 'auto'
    tp: int = 1
    dp: int = 1
    dp_rank: int = 0
    ep: int = 1
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float = 0.8
    prefill_interval: int = 16
    block_size: int = 64
    num_cpu_blocks: int = 0
    num_gpu_blocks: int = 0
    adapters: dict[str, str] | None = None
    max_prefill_token_num: int = 4096
    thread_safe: bool = False
    enable_prefix_caching: bool = False
    device_type: str = 'cuda'
    eager_mode: bool = False
    custom_module_map: dict[str, str] | None = None
    download_dir: str | None = None
    revision: str | None = None
    quant_policy: int = 0
    distributed_executor_backend: str | None = None
    empty_init: bool = False
    enable_microbatch: bool = False
    enable_eplb: bool = False
    model_format: str | None = None
    role: str = 'Hybrid'
    migration_backend: str = 'DLSlime'
    enable_mp_engine: bool = False
    enable_metrics: bool = True
    hf_overrides: dict | None = None
    logprobs_mode: str | None = None
    attn_tp_size: int | None = None
    mlp_tp_size: int | None = None
    moe_tp_size: int | None = None
    kernel_block_size: int = -1
    cudagraph_capture_batch_sizes: list[int] | None = None
    prefix_cache_state_budget: int = 0
    prefix_cache_decode_state_interval: int = 0
    mp_engine_backend: str = 'mp'
    language_model_only: bool = False
    enable_return_routed_experts: bool = False
    enable_transfer_obj_ref: bool = False
    dllm_block_length: int | None = None
    dllm_unmasking_strategy: str = 'low_confidence_dynamic'
    dllm_denoising_steps: int | None = None
    dllm_confidence_threshold: float = 0.85
    kv_transfer_config: Any = None
    piecewise_cudagraph_max_tokens: int | None = None
    lm_head_dtype: str = 'auto'
    exact_weights: bool = False


@dataclass
class VisionConfig:
    """Vision options.

    Args:
        max_batch_size: more than 1: the pictures that a step encodes at most; 1, the default, leaves it to the engine.
        thread_safe: accepted; the pipeline is always safe to use from several threads.
    """

    max_batch_size: int = 1
    thread_safe: bool = False


class ResponseType(enum.Enum):
    """Outcome classes of the engine, under LMDeploy's names."""

    SUCCESS = enum.auto()
    FINISH = enum.auto()
    ENGINE_STOP_ERROR = enum.auto()
    SESSION_REPEAT = enum.auto()
    SESSION_NOT_EXIST = enum.auto()
    HANDLER_NOT_EXIST = enum.auto()
    INPUT_LENGTH_ERROR = enum.auto()
    INTERNAL_ENGINE_ERROR = enum.auto()
    CANCEL = enum.auto()


@dataclass
class Response:
    """One answer, or one piece of it while streaming.

    Args:
        text: the answer; while streaming, what is new since the last piece.
        generate_token_len: tokens generated so far; the end token does not count.
        input_token_len: tokens of the prompt.
        finish_reason: None while it goes on, then ``'stop'``, ``'length'``, ``'abort'`` or ``'error'``.
        token_ids: the answer's tokens; while streaming, the new ones.
        logprobs: per token ``{token id: log-probability}``, the sampled token first.
        logits: ``[rows, vocab]`` float32 on the CPU, when asked for.
        last_hidden_state: ``[rows, hidden]`` float32 on the CPU, when asked for.
        index: which prompt of the call this answers.
        error_code: with ``finish_reason='error'``, the error's stable code.
        error_message: and its text.
        cached_tokens: prompt tokens that the prefix cache answered.
    """

    text: str
    generate_token_len: int
    input_token_len: int
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    logits: Any = None
    last_hidden_state: Any = None
    index: int = 0
    error_code: str | None = field(default=None, repr=False)
    error_message: str | None = field(default=None, repr=False)
    cached_tokens: int = field(default=0, repr=False)


@dataclass
class EngineOutput:
    """What the engine says of one step of one request, under LMDeploy's names."""

    status: ResponseType
    token_ids: list[int]
    num_token: int
    logprobs: list[dict[int, float]] | None = None
    logits: Any = None
    last_hidden_state: Any = None
    cache_block_ids: list[int] | None = None


@dataclass
class GenOut:
    """One piece of an answer, or all of it, from the asynchronous ``Pipeline.generate``; LMDeploy's names.

    Args:
        response: the text.
        history_token_len: always 0: the whole conversation is the input.
        input_token_len: tokens of the input.
        generate_token_len: tokens generated so far.
        cache_block_ids: always None.
        index: which of the ``n`` answers.
        error_code, error_message: with ``finish_reason='error'``.
    """

    response: str
    history_token_len: int
    input_token_len: int
    generate_token_len: int
    finish_reason: FinishReason | None = None
    token_ids: list[int] | None = None
    logprobs: list[dict[int, float]] | None = None
    logits: Any = None
    last_hidden_state: Any = None
    cache_block_ids: list[int] | None = None
    index: int = field(default=0, repr=False)
    error_code: str | None = field(default=None, repr=False)
    error_message: str | None = field(default=None, repr=False)

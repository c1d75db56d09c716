"""SamplingParams: what one request asks of the sampler, in numbers only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Rows = Literal['all', 'generation'] | None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling parameters, validated and resolved: no ``None`` where a number is meant.

    The order in which the sampler applies them is: grammar mask, ``logits_processors``, ``logit_bias``,
    repetition / presence / frequency penalties, bans (``banned_ids``, ``bad_sequences``, ``stop_ids`` before
    ``min_new_tokens``), temperature, top-k, top-p, min-p, draw.
    """

    max_new_tokens: int = 512
    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0  # over generated tokens
    seed: int = 0  # draw i depends on (seed, i) only, never on the batch
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()  # any of them ends the request; it is not part of the output
    banned_ids: tuple[int, ...] = ()  # never sampled (bad words of one token; eos under ignore_eos)
    bad_sequences: tuple[tuple[int, ...], ...] = ()  # their last token is banned where the others stand before it
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int = -1  # -1: none; k >= 0: the sampled token's and the k best
    output_logits: Rows = None
    output_hidden: Rows = None
    # (token_ids, logits) -> logits
    logits_processors: tuple[Callable[[Any, Any], Any], ...] = field(default=(), repr=False)

    @property
    def needs_host(self) -> bool:
        """Whether sampling waits for Python code of the caller: such rows do not overlap."""
        return bool(self.logits_processors)

"""EngineConfig: the one internal configuration of the engine (both public configs are spellings of it)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the user asked for, normalised. ``None`` means that the device side decides (see ``Capacity``)."""

    dtype: str = 'auto'  # auto | float32 | bfloat16 | float16
    device: str = 'auto'  # auto | cpu | cuda
    tp: int = 1
    runner: str = 'eager'  # graph | eager
    executor: str = 'auto'  # auto: a process for each rank where there are several | local | process
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_share: float = 0.8  # of the memory that is free after the weights
    num_blocks: int | None = None  # explicit number of KV blocks, instead of the share
    block_size: int = 64
    prefix_caching: bool = False
    quant_policy: int = 0  # KV cache bits: 0 (as the model), 8, 4
    head: str = ''  # codes of the output head: '' as it is stored | int8 | float8_e4m3fn
    exact: bool = False  # block-quantised weights of GGUF files become dense ones
    max_step_tokens: int | None = None  # token budget of one step
    model_format: str | None = None  # None: what config.json says | hf: not quantised | a quant_method; checked
    load_format: str = 'auto'  # auto: the model's files | dummy: random weights from config.json alone
    max_pictures: int | None = None  # that a step encodes at most
    rope_scaling_factor: float = 0.0  # > 1: dynamic NTK by this factor
    depth: int | None = None  # launched, unretired steps: 1 synchronous, 2 overlapped

    def depth_on(self, device: str) -> int:
        """The depth on ``device``: overlap pays only where a launch returns before the step has run."""
        return self.depth or (1 if device == 'cpu' else 2)

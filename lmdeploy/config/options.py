"""normalise(): from the two public engine configs to the one EngineConfig, by a table of every public field.

A field is *honoured* (it sets a field of :class:`EngineConfig`), a *hint* (accepted, told at DEBUG level: nothing would
change), *handled elsewhere* (the model source), or *refused*: any value but its default raises ``ConfigError`` and
names the field. Nothing is accepted and ignored in silence.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.quantization import METHODS
from lmdeploy.errors import ConfigError
from lmdeploy.log import get_logger
from lmdeploy.messages import PytorchEngineConfig, TurbomindEngineConfig, VisionConfig

PublicConfig = TurbomindEngineConfig | PytorchEngineConfig
Fate = Literal['honoured', 'hint', 'elsewhere', 'refused']

DTYPES = {'auto': 'auto', 'float16': 'float16', 'bfloat16': 'bfloat16', 'float32': 'float32', 'half': 'float16',
          'fp16': 'float16', 'bf16': 'bfloat16', 'fp32': 'float32'}
DEVICES = {'cuda': 'auto', 'auto': 'auto', 'cpu': 'cpu'}  # 'cuda', the public default, means the best device there is
LOG_LEVELS = ('CRITICAL', 'ERROR', 'WARNING', 'INFO', 'DEBUG')
EXECUTORS = {None: 'auto', 'uni': 'local', 'mp': 'process'}
HEADS = {'auto': '', 'int8': 'int8', 'fp8': 'float8_e4m3fn'}
QUANT_POLICIES = {0: 0, 8: 8, 4: 4}
MODEL_FORMATS = {None: None, 'hf': 'hf'} | {method: method for method in METHODS}
MAX_COUNT = 1 << 24  # no sane length, batch or block count is larger; keeps hostile numbers away from allocations


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of one public field. ``set`` returns EngineConfig fields; it raises ConfigError on bad values."""

    fate: Fate
    set: Callable[[str, Any], dict[str, Any]] | None = None


def _choice(target: str, choices: dict[Any, Any]) -> Rule:
    def set_(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, (str, int, type(None))) or value not in choices or (
                isinstance(value, bool) != any(isinstance(choice, bool) for choice in choices)):
            raise ConfigError('LMD-221', field=name, value=value, choices=', '.join(map(repr, choices)))
        return {target: choices[value]}

    return Rule('honoured', set_)


def _count(target: str, least: int = 1, none: bool = True, zero: Any = ...) -> Rule:
    def set_(name: str, value: Any) -> dict[str, Any]:
        if value is None and none:
            return {target: None}
        if isinstance(value, int) and not isinstance(value, bool):
            if value == 0 and zero is not ...:
                return {} if zero is None else {target: zero}
            if least <= value <= MAX_COUNT:
                return {target: value}
        raise ConfigError('LMD-222', field=name, value=value, least=least, most=MAX_COUNT)

    return Rule('honoured', set_)


def _flag(target: str) -> Rule:
    def set_(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, bool):
            raise ConfigError('LMD-221', field=name, value=value, choices='True, False')
        return {target: value}

    return Rule('honoured', set_)


def _cache(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_COUNT:
        return {'num_blocks': value}
    if isinstance(value, float) and math.isfinite(value) and 0 < value < 1:
        return {'cache_share': value}
    raise ConfigError('LMD-223', field=name, value=value)


def _block_size(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 4096 and value % 64 == 0:
        return {'block_size': value}
    raise ConfigError('LMD-224', field=name, value=value)


def _folder(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise ConfigError('LMD-228', field=name, given=type(value).__name__, wanted='the path of a folder')
    return {}


def _rope_factor(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and (value == 0 or 1 <= value <= 1024):
        return {'rope_scaling_factor': float(value)}
    raise ConfigError('LMD-225', field=name, value=value)


def _tp(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError('LMD-222', field=name, value=value, least=1, most=64)
    return {'tp': value}


HINT, ELSEWHERE, REFUSED = Rule('hint'), Rule('elsewhere'), Rule('refused')

SHARED = {
    'dtype': _choice('dtype', DTYPES),
    'tp': Rule('honoured', _tp),
    'session_len': _count('session_len'),
    'max_batch_size': _count('max_batch_size'),
    'cache_max_entry_count': Rule('honoured', _cache),
    'enable_prefix_caching': _flag('prefix_caching'),
    'quant_policy': _choice('quant_policy', QUANT_POLICIES),
    'lm_head_dtype': _choice('head', HEADS),
    'exact_weights': _flag('exact'),
    'max_prefill_token_num': _count('max_step_tokens', zero=None),
    'model_format': _choice('model_format', MODEL_FORMATS),
    'download_dir': Rule('elsewhere', _folder),
    'revision': ELSEWHERE,
    'dp': REFUSED,
    'ep': REFUSED,
    'empty_init': _choice('load_format', {False: 'auto', True: 'dummy'}),
    'hf_overrides': REFUSED,
    'enable_metrics': HINT,
}
TURBOMIND = SHARED | {
    'rope_scaling_factor': Rule('honoured', _rope_factor),
    'cache_block_seq_len': Rule('honoured', _block_size),
    'use_logn_attn': REFUSED,
    'device_num': REFUSED,
    'attn_tp_size': REFUSED,
    'attn_dp_size': REFUSED,
    'mlp_tp_size': REFUSED,
    'mlp_dp_size': REFUSED,
    'outer_dp_size': REFUSED,
    'cp': REFUSED,
    'nnodes': REFUSED,
    'node_rank': REFUSED,
    'dist_init_addr': REFUSED,
    'devices': REFUSED,
    'cache_chunk_size': HINT,
    'num_tokens_per_iter': HINT,
    'max_prefill_iters': HINT,
    'communicator': HINT,
    'attn_cp_size': REFUSED,
    'cache_checkpoint_interval': HINT,
    'cache_prompt': REFUSED,
    'cache_prompt_boundary_skip': HINT,
    'cache_generation': REFUSED,
    'async_': HINT,
    'language_model_only': REFUSED,
    'gemm_input_dtype': REFUSED,
    'moe_a2a_backend': HINT,
}
PYTORCH = SHARED | {
    'block_size': Rule('honoured', _block_size),
    'num_gpu_blocks': _count('num_blocks', none=False, zero=None),
    'device_type': _choice('device', DEVICES),
    'eager_mode': _choice('runner', {False: 'graph', True: 'eager'}),
    'distributed_executor_backend': _choice('executor', EXECUTORS),
    'adapters': REFUSED,
    'dp_rank': REFUSED,
    'num_cpu_blocks': REFUSED,
    'custom_module_map': REFUSED,
    'enable_microbatch': REFUSED,
    'enable_eplb': REFUSED,
    'role': REFUSED,
    'logprobs_mode': REFUSED,
    'migration_backend': HINT,
    'prefill_interval': HINT,
    'thread_safe': HINT,
    'enable_mp_engine': HINT,
    'attn_tp_size': REFUSED,
    'mlp_tp_size': REFUSED,
    'moe_tp_size': REFUSED,
    'kernel_block_size': HINT,
    'cudagraph_capture_batch_sizes': HINT,
    'prefix_cache_state_budget': HINT,
    'prefix_cache_decode_state_interval': HINT,
    'mp_engine_backend': HINT,
    'language_model_only': REFUSED,
    'enable_return_routed_experts': REFUSED,
    'enable_transfer_obj_ref': HINT,
    'dllm_block_length': REFUSED,
    'dllm_unmasking_strategy': REFUSED,
    'dllm_denoising_steps': REFUSED,
    'dllm_confidence_threshold': REFUSED,
    'kv_transfer_config': REFUSED,
    'piecewise_cudagraph_max_tokens': HINT,
}
TABLES: dict[type, dict[str, Rule]] = {TurbomindEngineConfig: TURBOMIND, PytorchEngineConfig: PYTORCH}


def log_level_of(value: Any) -> int:
    """The number of a log level that is given by name (``'WARNING'``) or number.

    Raises:
        ConfigError: LMD-221: it is none.
    """
    number = logging.getLevelName(value.upper()) if isinstance(value, str) else value
    if not isinstance(number, int) or isinstance(number, bool):
        raise ConfigError('LMD-221', field='log_level', value=value, choices=', '.join(map(repr, LOG_LEVELS)))
    return number


def normalise(public: PublicConfig | None, vision: VisionConfig | None = None) -> EngineConfig:
    """The EngineConfig that ``public`` (None: ``TurbomindEngineConfig()``) and ``vision`` ask for; pure.

    Raises:
        ConfigError: a field has an impossible value, or asks for what this version cannot do.
    """
    public = TurbomindEngineConfig() if public is None else public
    table = TABLES.get(type(public))
    if table is None:
        raise ConfigError('LMD-220', given=type(public).__name__)
    chosen: dict[str, Any] = {'runner': 'graph'}
    for spec in fields(public):
        value, rule = getattr(public, spec.name), table[spec.name]
        if rule.set is not None:
            chosen.update(rule.set(spec.name, value))
        elif rule.fate in ('refused', 'hint') and value != spec.default:
            if rule.fate == 'refused':
                raise ConfigError('LMD-227', field=spec.name, value=value, default=spec.default)
            get_logger().debug('%s=%r is a hint that changes nothing here', spec.name, value)
    return EngineConfig(**chosen, max_pictures=_max_pictures(vision))


def _max_pictures(vision: VisionConfig | None) -> int | None:
    """What ``VisionConfig.max_batch_size`` means: its default of 1 leaves it to the engine, more is a limit."""
    if vision is None:
        return None
    if not isinstance(vision, VisionConfig):
        raise ConfigError('LMD-228', field='vision_config', given=type(vision).__name__, wanted='a VisionConfig')
    rule = _count('max_pictures', none=False)
    assert rule.set is not None
    asked = rule.set('max_batch_size', vision.max_batch_size)['max_pictures']
    return asked if asked > 1 else None

"""RopeConfig: how positions turn into rotations, read from either spelling of Hugging Face configs.

Old configs have ``rope_theta`` beside ``rope_scaling``; newer ones join both in ``rope_parameters``, with one such
object per kind of layer where a model has several.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lmdeploy.config.fields import Fields
from lmdeploy.errors import ConfigError

ROPE_TYPES = ('default', 'linear', 'dynamic', 'llama3', 'yarn', 'frequency_factors')
MAX_POSITIONS = 1 << 27
MAX_THETA = 1e12
MAX_FACTOR = 1e6


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """The rotation of ``rotary_dim`` leading channels of every head.

    Attributes:
        rope_type: one of ``ROPE_TYPES``.
        theta: base of the wavelengths. Of a dynamic type it is the original one; ``length`` tells how it is raised.
        factor: by how much the context was stretched.
        original: context length before stretching; 0 where the type needs none.
        length: context length that a dynamic base is fixed for.
        low_freq_factor, high_freq_factor: llama3: turns within the original context between which factors blend.
        beta_fast, beta_slow: yarn: the same idea, in turns.
        attention_factor: yarn: factor of cosines and sines; 0 means the usual one of ``factor``.
        mscale, mscale_all_dim: yarn: where both are given, the attention factor is the ratio of their two scales.
        truncate: yarn: whether the blending range is rounded to whole channels.
        factors: frequency_factors: what the frequencies are divided by, one per pair of channels.
        sections: how many frequencies take each of the three rows of positions; empty: there is one row.
    """

    rope_type: str = 'default'
    theta: float = 10000.0
    rotary_dim: int = 0
    factor: float = 1.0
    original: int = 0
    length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    sections: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RopeContext:
    """What reading a rope needs of the rest: defaults, and the lengths that stretched types refer to.

    ``stretch`` above 1 makes an unscaled rope dynamic by that factor (the option ``rope_scaling_factor``).
    """

    head_dim: int
    max_positions: int
    length: int
    theta: float = 10000.0
    stretch: float = 0.0


def read_rope(config: Fields, kind: str, context: RopeContext) -> RopeConfig:
    """The rope of the layers of ``kind`` (``'full_attention'`` or ``'sliding_attention'``) in a model's config.

    Raises:
        ConfigError: LMD-111 unknown type; LMD-112 to LMD-114 fields that are missing, impossible or contradictory.
    """
    parameters = config.object('rope_parameters')
    if parameters is not None:
        for name in ('full_attention', 'sliding_attention'):
            nested = parameters.object(name)
            if nested is not None and (name == kind or not parameters.has(kind)):
                return _read(nested, nested, context)
        return _read(parameters, parameters if parameters.has('rope_theta') else config, context)
    if kind == 'sliding_attention' and config.has('rope_local_base_freq'):
        theta = config.number('rope_local_base_freq', 1.0, MAX_THETA)
        return RopeConfig('default', theta, _rotary_dim(config, context))
    scaling = config.object('rope_scaling')
    return _read(Fields({}) if scaling is None else scaling, config, context)


def _rotary_dim(config: Fields, context: RopeContext) -> int:
    dim = int(context.head_dim * config.number('partial_rotary_factor', 0.0, 1.0, 1.0))
    if dim < 2 or dim % 2:
        raise config.bad('partial_rotary_factor', f'such that an even part of {context.head_dim} channels rotates')
    return dim


def _read(scaling: Fields, base: Fields, context: RopeContext) -> RopeConfig:
    return replace(_read_type(scaling, base, context), sections=_sections(scaling, _rotary_dim(base, context)))


def _sections(scaling: Fields, dim: int) -> tuple[int, ...]:
    if not scaling.has('mrope_section'):
        return ()
    if scaling.flag('mrope_interleaved', False):
        raise ConfigError('LMD-115', field=f'{scaling.path}mrope_interleaved', value='True', known='False')
    given = scaling.raw('mrope_section')
    if not isinstance(given, list) or len(given) != 3 or not all(type(n) is int and n >= 0 for n in given) or (
            2 * sum(given) != dim):
        raise scaling.bad('mrope_section', f'three numbers whose sum is {dim // 2}')
    return tuple(given)


def _read_type(scaling: Fields, base: Fields, context: RopeContext) -> RopeConfig:
    key = 'rope_type' if scaling.has('rope_type') else 'type'
    rope_type = scaling.text(key, 'default')
    if rope_type == 'mrope' and scaling.has('mrope_section'):
        rope_type = 'default'
    theta = base.number('rope_theta', 1.0, MAX_THETA, context.theta)
    dim = _rotary_dim(base, context)
    if rope_type == 'default' and context.stretch > 1:
        return RopeConfig('dynamic', theta, dim, context.stretch, context.max_positions, context.length)
    if rope_type == 'default':
        return RopeConfig('default', theta, dim)
    if rope_type not in ROPE_TYPES:
        where = scaling.path.rstrip('.')
        raise ConfigError('LMD-111', rope_type=rope_type[:80], field=where, known=', '.join(ROPE_TYPES))
    if rope_type == 'frequency_factors':
        return RopeConfig(rope_type, theta, dim, factors=scaling.floats('factors', dim // 2))
    factor = scaling.number('factor', 0.0, MAX_FACTOR)
    if rope_type == 'linear':
        return RopeConfig(rope_type, theta, dim, factor)
    original = scaling.whole('original_max_position_embeddings', 1, MAX_POSITIONS, context.max_positions)
    if rope_type == 'dynamic':
        if factor < 1.0 or dim < 4:
            raise scaling.bad('factor', 'at least 1, for heads of at least 4 channels')
        return RopeConfig(rope_type, theta, dim, factor, context.max_positions, context.length)
    if rope_type == 'llama3':
        low = scaling.number('low_freq_factor', 0.0, MAX_FACTOR)
        high = scaling.number('high_freq_factor', 0.0, MAX_FACTOR)
        if high <= low:
            raise ConfigError('LMD-114', reason=f'high_freq_factor {high:g} is not above low_freq_factor {low:g}')
        return RopeConfig(rope_type, theta, dim, factor, original, low_freq_factor=low, high_freq_factor=high)
    return RopeConfig(
        rope_type, theta, dim, factor, original,
        beta_fast=scaling.number('beta_fast', 0.0, MAX_FACTOR, 32.0),
        beta_slow=scaling.number('beta_slow', 0.0, MAX_FACTOR, 1.0),
        attention_factor=scaling.number('attention_factor', 0.0, MAX_FACTOR, 0.0),
        mscale=scaling.number('mscale', 0.0, MAX_FACTOR, 0.0),
        mscale_all_dim=scaling.number('mscale_all_dim', 0.0, MAX_FACTOR, 0.0),
        truncate=scaling.flag('truncate', True),
    )  # fmt: skip

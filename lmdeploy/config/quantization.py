"""Quantization: how a checkpoint says that its linear layers are stored; ``quantization_config`` read and checked.

Every method is read into one form: rules from names of layers to a :class:`Storage`. What cannot be read is refused
here, by field and value, before a weight file is touched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lmdeploy.config.fields import Fields, shown
from lmdeploy.errors import ConfigError
from lmdeploy.log import get_logger

AWQ, GPTQ, FP8, SMOOTH = 'awq', 'gptq', 'fp8', 'smooth_quant'
COMPRESSED = 'compressed-tensors'
PACK, INT, FLOAT = 'pack-quantized', 'int-quantized', 'float-quantized'
METHODS = (AWQ, GPTQ, COMPRESSED, FP8, SMOOTH)
MAX_GROUP = 1 << 17
MAX_PATTERNS, MAX_PATTERN = 100_000, 1024
HADAMARDS = tuple(1 << power for power in range(1, 11))  # sizes of a block of channels
_REPEATED_GROUP = re.compile(r'\)[*+{]')  # (a+)+ and its kin, which take exponential time
_NESTED = ('language_config', 'llm_config', 'text_config')


@dataclass(frozen=True, slots=True)
class Storage:
    """How the layers of one rule are stored.

    Attributes:
        format: one of AWQ, GPTQ, PACK, INT, FLOAT, FP8, SMOOTH.
        kind: what a code is: ``'int'``, ``'float8_e4m3fn'`` or ``'float8_e5m2'``.
        bits: of a code.
        group: input channels that share a scale; 0: all.
        rows: output channels that share a scale; 1, but more in blocks, and 0: all of them, one scale per tensor.
        symmetric: there are no zero points, or they are all in the middle.
        zero_shift: what a stored zero point lacks.
        activation: what inputs are quantised to: ``''`` (they are not), ``'int8'``, ``'float8_e4m3fn'``, ...
        activation_group: input channels of a token that share a scale; 0: all.
        static: inputs have one scale, which is stored with the layer.
        transform: what is done to inputs before the product, ``'hadamard:128'``; ``''``: nothing.
    """

    format: str
    kind: str = 'int'
    bits: int = 8
    group: int = 0
    rows: int = 1
    symmetric: bool = True
    zero_shift: int = 0
    activation: str = ''
    activation_group: int = 0
    static: bool = False
    transform: str = ''


@dataclass(frozen=True, slots=True)
class Rule:
    """Layers whose names match ``pattern`` are stored so; None: they are not quantised.

    A pattern is ``'re:'`` and a regular expression for the beginning of the name, or whole components of it
    (``'lm_head'``, ``'layers.0.mlp'``), or ``''`` for all.
    """

    pattern: str
    storage: Storage | None

    def matches(self, name: str) -> bool:
        if self.pattern.startswith('re:'):
            return re.match(self.pattern[3:], name) is not None
        return not self.pattern or f'.{self.pattern}.' in f'.{name}.'


@dataclass(frozen=True, slots=True)
class TransformRule:
    """Inputs of the layers that match one of ``targets``, and none of ``ignored``, are transformed as ``name`` says."""

    targets: tuple[Rule, ...]
    ignored: tuple[Rule, ...]
    name: str

    def matches(self, name: str) -> bool:
        return any(rule.matches(name) for rule in self.targets) and not any(r.matches(name) for r in self.ignored)


@dataclass(frozen=True, slots=True)
class Quantization:
    """All of a checkpoint's rules; the first that matches a layer decides.

    Attributes:
        method: one of METHODS.
    """

    method: str
    rules: tuple[Rule, ...]
    transforms: tuple[TransformRule, ...] = ()

    def storage(self, name: str) -> Storage | None:
        """How the layer ``name`` is stored; None: as plain floating-point numbers."""
        found = next((rule.storage for rule in self.rules if rule.matches(name)), None)
        return replace(found, transform=self.transform(name)) if found is not None and self.transforms else found

    def transform(self, name: str) -> str:
        """What is done to the inputs of the layer ``name``, quantised or not, see :attr:`Storage.transform`."""
        return next((rule.name for rule in self.transforms if rule.matches(name)), '')


def hadamard_name(block: int) -> str:
    """The name of the block Hadamard transform, for :attr:`Storage.transform`."""
    return f'hadamard:{block}'


def hadamard_block(name: str) -> int:
    """The inverse."""
    kind, _, block = name.partition(':')
    if kind != 'hadamard':
        raise ValueError(f'there is no transform {name!r}')
    return int(block)


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """The ``quantization_config`` of a config.json, at its top or in the part of the language model; None without.

    Raises:
        ConfigError: LMD-112, LMD-113 a field is missing or impossible; LMD-115, LMD-116 this version cannot read it.
    """
    fields = _find(config)
    if fields is None:
        return None
    method = fields.text('quant_method', 'unknown')
    reader = {AWQ: _awq, GPTQ: _gptq, COMPRESSED: _compressed, FP8: _fp8, SMOOTH: _smooth}.get(method)
    if reader is None:
        raise ConfigError('LMD-116', method=method[:80], known=', '.join(METHODS))
    return Quantization(method, reader(fields), _transforms(fields) if method == COMPRESSED else ())


def check_model_format(model_format: str | None, config: Mapping[str, Any]) -> None:
    """Refuse a ``model_format`` that is not what ``config``, a config.json, says; None fits everything.

    Raises:
        ConfigError: LMD-229; and as :func:`read_quantization`.
    """
    if model_format is None:
        return
    quantization = read_quantization(config)
    found = 'hf' if quantization is None else quantization.method
    if found != model_format:
        raise ConfigError('LMD-229', value=model_format, found=found)


def _find(config: Mapping[str, Any]) -> Fields | None:
    places = [Fields(config)]
    places += [Fields(config[key], f'{key}.') for key in _NESTED if isinstance(config.get(key), Mapping)]
    for place in places:
        for name in ('quantization_config', 'compression_config'):
            if (found := place.object(name)) is not None:
                return found
    return None


# -- methods -----------------------------------------------------------------------------------------------------------


def _awq(fields: Fields) -> tuple[Rule, ...]:
    bits = fields.whole('bits', 1, 64, None) or fields.whole('w_bit', 1, 64)
    _among(fields, 'bits', bits, (4,))
    version = fields.text('version', 'gemm')
    _among(fields, 'version', version.lower(), ('gemm',))
    group = _group(fields, 'group_size' if fields.has('group_size') else 'q_group_size')
    storage = Storage(AWQ, bits=bits, group=group, symmetric=not fields.flag('zero_point', True))
    return (*_ignored(fields, 'modules_to_not_convert'), Rule('', storage))


def _gptq(fields: Fields) -> tuple[Rule, ...]:
    bits = _gptq_bits(fields, None)
    form = fields.text('checkpoint_format', fields.text('format', 'gptq'))
    _among(fields, 'checkpoint_format', form, ('gptq', 'gptq_v2'))
    _among(fields, 'pack_dtype', fields.text('pack_dtype', 'int32'), ('int32',))
    shift = 1 if form == 'gptq' else 0
    group, symmetric = _group(fields, 'group_size'), fields.flag('sym', True)
    rules = [*_ignored(fields, 'modules_to_not_convert')]
    dynamic = fields.object('dynamic')
    for pattern in dynamic.values if dynamic is not None else ():
        if not isinstance(pattern, str):
            raise fields.bad('dynamic', 'an object of regular expressions')
        regex = 're:' + pattern.removeprefix('+:').removeprefix('-:')
        _check_pattern(fields, 'dynamic', regex)
        if pattern.startswith('-:'):
            rules.append(Rule(regex, None))
            continue
        own = dynamic.object(pattern) if dynamic is not None else None
        if own is None:
            raise fields.bad('dynamic', 'an object of objects')
        rules.append(Rule(regex, Storage(
            GPTQ, bits=_gptq_bits(own, bits), group=_group(own, 'group_size', group),
            symmetric=own.flag('sym', symmetric), zero_shift=shift)))  # fmt: skip
    rules.append(Rule('', Storage(GPTQ, bits=bits, group=group, symmetric=symmetric, zero_shift=shift)))
    return tuple(rules)


def _gptq_bits(fields: Fields, default: int | None) -> int:
    bits = fields.whole('bits', 1, 64) if default is None else fields.whole('bits', 1, 64, default)
    _among(fields, 'bits', bits, (2, 3, 4, 8))
    return bits


def _fp8(fields: Fields) -> tuple[Rule, ...]:
    _among(fields, 'fmt', fields.text('fmt', 'e4m3'), ('e4m3',))
    scheme = fields.text('activation_scheme', 'dynamic')
    _among(fields, 'activation_scheme', scheme, ('dynamic', 'static'))
    if fields.has('scale_fmt'):
        _among(fields, 'scale_fmt', fields.text('scale_fmt'), ('float',))
    rows, group = _block(fields, 'weight_block_size') if fields.has('weight_block_size') else (0, 0)
    if rows and scheme == 'static':
        raise ConfigError('LMD-114', reason='weight_block_size needs activation_scheme dynamic')
    storage = Storage(FP8, 'float8_e4m3fn', 8, group, rows, activation='float8_e4m3fn', activation_group=group,
                      static=scheme == 'static')  # fmt: skip
    return (*_ignored(fields, 'modules_to_not_convert'), *_ignored(fields, 'ignored_layers'), Rule('', storage))


def _smooth(fields: Fields) -> tuple[Rule, ...]:
    kind = fields.text('quant_dtype', 'int8')
    _among(fields, 'quant_dtype', kind, ('int8', 'float8_e4m3fn', 'float8_e5m2'))
    storage = Storage(SMOOTH, 'int' if kind == 'int8' else kind, activation=kind)
    return (*_ignored(fields, 'modules_to_not_convert'), Rule('', storage))


def _compressed(fields: Fields) -> tuple[Rule, ...]:
    _among(fields, 'quantization_status', fields.text('quantization_status', 'compressed'), ('compressed',))
    nested = fields.object('sparsity_config')
    sparsity = None if nested is None else nested.raw('format')
    if sparsity not in (None, 'dense'):
        raise ConfigError('LMD-115', field=f'{fields.path}sparsity_config.format', value=shown(sparsity), known='null')
    if fields.has('kv_cache_scheme'):
        get_logger().warning('%skv_cache_scheme is not used: quant_policy says how the KV cache is stored', fields.path)
    rules = [*_ignored(fields, 'ignore')]
    groups = fields.object('config_groups')
    if groups is None or not groups.values:
        raise ConfigError('LMD-112', field=f'{fields.path}config_groups', wanted='an object of groups of layers')
    form = fields.text('format', '')
    for name in groups.values:
        group = groups.object(name)
        if group is None:
            raise groups.bad(name, 'an object of named fields')
        storage = _compressed_group(group, group.text('format', form))
        targets = group.raw('targets')
        if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
            raise group.bad('targets', 'a list of names of layers')
        for target in targets:
            _check_pattern(group, 'targets', target)
            rules.append(Rule('' if target == 'Linear' else target, storage))
    return tuple(sorted(rules, key=lambda rule: not rule.pattern))  # a name goes before a class of layers


def _compressed_group(group: Fields, form: str) -> Storage:
    weights = group.object('weights')
    if weights is None:
        raise ConfigError('LMD-112', field=f'{group.path}weights', wanted='an object of named fields')
    kind = weights.text('type', 'int')
    _among(weights, 'type', kind, ('int', 'float'))
    bits = weights.whole('num_bits', 1, 64, 8)
    if form == 'naive-quantized':  # the name of both before there were two
        form = INT if kind == 'int' else FLOAT
    _among(group, 'format', form, (PACK, FLOAT, INT) if kind == 'int' else (FLOAT,))
    if form == FLOAT and kind == 'int':
        raise ConfigError('LMD-114', reason=f'{group.path}format is {form}, but the weights are integers')
    _among(weights, 'num_bits', bits, tuple(range(2, 9)) if kind == 'int' else (8,))
    symmetric = weights.flag('symmetric', True)
    if kind == 'float' and not symmetric:
        raise ConfigError('LMD-115', field=f'{weights.path}symmetric', value='False', known='True')
    if weights.has('dynamic'):
        _among(weights, 'dynamic', weights.raw('dynamic'), (False,))
    size, rows = _strategy(weights, form)
    if form == PACK and not rows and not symmetric:
        raise ConfigError('LMD-115', field=f'{weights.path}strategy', value="'tensor' with zero points",
                          known='group, channel')  # fmt: skip
    activation, inner, static = _compressed_inputs(group)
    if group.has('output_activations'):
        raise ConfigError('LMD-115', field=f'{group.path}output_activations',
                          value=shown(group.raw('output_activations')), known='null')  # fmt: skip
    return Storage(form, 'int' if kind == 'int' else 'float8_e4m3fn', bits, size, rows, symmetric,
                   activation=activation, activation_group=inner, static=static)  # fmt: skip


def _transforms(fields: Fields) -> tuple[TransformRule, ...]:
    """What a ``transform_config`` does to inputs while the model runs; what it did to weights is in them already."""
    config = fields.object('transform_config')
    groups = None if config is None else config.object('config_groups')
    rules = []
    for name in groups.values if groups is not None else ():
        group = groups.object(name) if groups is not None else None
        entries = None if group is None else group.raw('apply')
        if group is None or not isinstance(entries, list):
            raise ConfigError('LMD-112', field=f'{fields.path}transform_config.config_groups.{name}.apply',
                              wanted='a list of objects')  # fmt: skip
        for i, entry in enumerate(entries):
            if not isinstance(entry, Mapping):
                raise group.bad('apply', 'a list of objects')
            apply = Fields(entry, f'{group.path}apply.{i}.')
            location = apply.text('location')
            _among(apply, 'location', location, ('input', 'weight_input', 'weight_output'))
            if location == 'input':
                rules.append(_transform(group, apply))
    return tuple(rules)


def _transform(group: Fields, apply: Fields) -> TransformRule:
    _among(group, 'type', group.text('type'), ('hadamard',))
    _among(group, 'randomize', group.flag('randomize', False), (False,))
    block = group.whole('head_dim', 1, MAX_GROUP, 0) if group.has('head_dim') else 0
    _among(group, 'head_dim', block, HADAMARDS)
    return TransformRule(_patterns(apply, 'targets'), _patterns(apply, 'ignore'), hadamard_name(block))


def _patterns(fields: Fields, name: str) -> tuple[Rule, ...]:
    """A name or a list of names of layers; ``Linear`` is all."""
    given = fields.raw(name)
    values = [given] if isinstance(given, str) else given or []
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise fields.bad(name, 'a list of names of layers')
    for value in values:
        _check_pattern(fields, name, value)
    return tuple(Rule('' if value == 'Linear' else value, None) for value in values)


def _strategy(weights: Fields, form: str) -> tuple[int, int]:
    """Input and output channels that share a scale."""
    strategy = weights.text('strategy', 'group' if weights.has('group_size') else 'tensor')
    _among(weights, 'strategy', strategy, ('tensor', 'channel', 'group', *(('block',) if form == FLOAT else ())))
    if strategy == 'group':
        return _group(weights, 'group_size'), 1
    if strategy == 'block':
        rows, size = _block(weights, 'block_structure')
        return size, rows
    return 0, 1 if strategy == 'channel' else 0


def _compressed_inputs(group: Fields) -> tuple[str, int, bool]:
    """What inputs are quantised to, in groups of how many channels, and whether the scale is stored."""
    inputs = group.object('input_activations')
    if inputs is None:
        return '', 0, False
    kind, bits = inputs.text('type', 'int'), inputs.whole('num_bits', 1, 64, 8)
    _among(inputs, 'type', kind, ('int', 'float'))
    _among(inputs, 'num_bits', bits, (8,))
    _among(inputs, 'symmetric', inputs.flag('symmetric', True), (True,))
    dynamic = inputs.raw('dynamic') or False
    _among(inputs, 'dynamic', dynamic, (True, False))
    strategy = inputs.text('strategy', 'tensor')
    _among(inputs, 'strategy', strategy, ('token', 'group') if dynamic else ('tensor',))
    size = _group(inputs, 'group_size') if strategy == 'group' else 0
    return 'int8' if kind == 'int' else 'float8_e4m3fn', size, not dynamic


# -- parts -------------------------------------------------------------------------------------------------------------


def _among(fields: Fields, name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ConfigError('LMD-115', field=fields.path + name, value=shown(value), known=', '.join(map(str, known)))


def _group(fields: Fields, name: str, default: int | None = None) -> int:
    """A group size; -1 (all channels) is 0."""
    if default is not None and not fields.has(name):
        return default
    size = fields.whole(name, -1, MAX_GROUP)
    if size == 0:
        raise fields.bad(name, 'a number of channels, or -1 for all')
    return max(size, 0)


def _block(fields: Fields, name: str) -> tuple[int, int]:
    """Rows and columns of a block."""
    block = fields.raw(name)
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n <= MAX_GROUP for n in block):
        raise fields.bad(name, 'a list of two sizes')
    return block[0], block[1]


def _ignored(fields: Fields, name: str) -> tuple[Rule, ...]:
    patterns = fields.raw(name)
    if patterns is None:
        return ()
    if not isinstance(patterns, list) or len(patterns) > MAX_PATTERNS or not all(isinstance(p, str) for p in patterns):
        raise fields.bad(name, 'a list of names of layers')
    for pattern in patterns:
        _check_pattern(fields, name, pattern)
    return tuple(Rule(pattern, None) for pattern in patterns if pattern)


def _check_pattern(fields: Fields, name: str, pattern: str) -> None:
    """Regular expressions come from the model's authors: they must compile, and may not take forever."""
    wanted = 'names of layers, or re: and a regular expression without repeated groups'
    if len(pattern) > MAX_PATTERN:
        raise ConfigError('LMD-113', field=fields.path + name, value=shown(pattern), wanted=wanted)
    if not pattern.startswith('re:'):
        return
    try:
        re.compile(pattern[3:])
    except (re.error, OverflowError, RecursionError):
        raise ConfigError('LMD-113', field=fields.path + name, value=shown(pattern), wanted=wanted) from None
    if _REPEATED_GROUP.search(pattern):
        raise ConfigError('LMD-113', field=fields.path + name, value=shown(pattern), wanted=wanted)

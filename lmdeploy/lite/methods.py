"""The methods by name: from a user's words to a recipe."""

from __future__ import annotations

from collections.abc import Iterable

from lmdeploy.config.quantization import AWQ as AWQ_FORMAT
from lmdeploy.config.quantization import FLOAT, INT, PACK, SMOOTH, Storage
from lmdeploy.config.quantization import GPTQ as GPTQ_FORMAT
from lmdeploy.errors import ConfigError
from lmdeploy.lite.awq import AWQ
from lmdeploy.lite.recipe import Effort, Recipe
from lmdeploy.lite.rotated import GPTQ, Rotation
from lmdeploy.lite.smooth import SmoothQuant
from lmdeploy.lite.source import Source

GROUPS = (128, 64, 32, 16, 256, 96, 48)  # that are proposed, the most usual first
GPTQ_BITS = (2, 3, 4, 8)
GPTQ_FORMATS = {'gptq': GPTQ_FORMAT, 'gptq_v2': GPTQ_FORMAT, 'awq': AWQ_FORMAT, 'compressed-tensors': PACK}
QUANT_DTYPES = {'int8': 'int8', 'fp8': 'float8_e4m3fn', 'float8_e4m3fn': 'float8_e4m3fn', 'float8_e5m2': 'float8_e5m2'}
PACKED = {'w4a8': (4, 128), 'w3': (3, 128), 'w2': (2, 64)}  # bits, usual group


def awq(bits: int = 4, group: int = 128, *, symmetric: bool = False, effort: Effort = 'normal', search: bool = True,
        smooth: bool = True) -> Recipe:  # fmt: skip
    """AWQ in AutoAWQ's format. ``group``: -1 is all channels; ``search``, ``smooth``: see :class:`AWQ`.

    Raises:
        ConfigError: LMD-610: the format holds 4 bits only.
    """
    if bits != 4:
        reason = 'the format of AWQ holds 4 bits; lite w2 and lite w3 have fewer, lite auto_gptq 8'
        raise ConfigError('LMD-610', option='--w-bits', value=bits, reason=reason)
    storage = Storage(AWQ_FORMAT, bits=4, group=max(group, 0), symmetric=symmetric)
    return AWQ(storage, effort, search, smooth)


def gptq(bits: int = 4, group: int = 128, *, symmetric: bool = True, form: str = 'gptq', rotation: Rotation = 'none',
         effort: Effort = 'normal') -> Recipe:  # fmt: skip
    """GPTQ in one of GPTQ_FORMATS; that of AWQ always has zero points.

    Raises:
        ConfigError: LMD-610: bits that the format does not hold.
    """
    if bits not in GPTQ_BITS or (form == 'awq' and bits != 4):
        reason = f'possible are {", ".join(map(str, GPTQ_BITS))}, and 4 in the format awq'
        raise ConfigError('LMD-610', option='--w-bits', value=bits, reason=reason)
    storage = Storage(GPTQ_FORMATS[form], bits=bits, group=max(group, 0), symmetric=symmetric and form != 'awq',
                      zero_shift=int(form == 'gptq'))  # fmt: skip
    return GPTQ(storage, rotation, effort)


def smooth_quant(quant_dtype: str = 'int8', *, form: str = 'smooth_quant', search: bool = False,
                 effort: Effort = 'normal') -> Recipe:  # fmt: skip
    """8-bit weights and inputs in LMDeploy's format or compressed-tensors.

    Args:
        quant_dtype: one of QUANT_DTYPES. search: scales for float8, too.

    Raises:
        ConfigError: LMD-610: no such type, or one that the format does not hold.
    """
    kind = QUANT_DTYPES.get(quant_dtype)
    if kind is None:
        raise ConfigError('LMD-610', option='--quant-dtype', value=quant_dtype,
                          reason=f'possible are {", ".join(QUANT_DTYPES)}')  # fmt: skip
    if form != 'smooth_quant' and kind == 'float8_e5m2':
        raise ConfigError('LMD-610', option='--format', value=form, reason='it holds float8_e4m3fn only')
    storage_format = SMOOTH if form == 'smooth_quant' else INT if kind == 'int8' else FLOAT
    storage = Storage(storage_format, 'int' if kind == 'int8' else kind, activation=kind)
    return SmoothQuant(storage, effort, kind == 'int8' or search)


def packed(method: str, group: int | None = None, *, rotation: Rotation = 'native',
           effort: Effort = 'normal') -> Recipe:  # fmt: skip
    """``'w4a8'``, ``'w3'`` or ``'w2'``, in compressed-tensors."""
    bits, usual = PACKED[method]
    eight = method == 'w4a8'
    storage = Storage(PACK, bits=bits, group=max(group or usual, 0), symmetric=eight,
                      activation='int8' if eight else '')  # fmt: skip
    return GPTQ(storage, rotation, effort, name=method)


def fitting_groups(source: Source) -> list[int]:
    """Those of GROUPS that divide the inputs of every layer."""
    return [size for size in GROUPS if not any(wide % size for _, _, wide in source.sizes())]


def nearest_group(possible: Iterable[int], wanted: int) -> int:
    """The most usual one that is no larger; -1 where there is none."""
    return next((size for size in possible if size <= wanted), -1)

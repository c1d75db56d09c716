"""Shapes of well-known models: their config.json without weights, for runs with random ones.

``shapes:llama3-8b`` stands wherever a benchmark takes a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmdeploy.errors import SourceError

FOLDER = Path(__file__).parent / 'configs'
PREFIX = 'shapes:'


def _compressed(weights: dict[str, Any], form: str, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {'targets': ['Linear'], 'weights': weights, 'input_activations': inputs, 'format': form}
    return {'quant_method': 'compressed-tensors', 'format': form, 'config_groups': {'group_0': group},
            'ignore': ['lm_head']}  # fmt: skip


def _integers(bits: int, **more: Any) -> dict[str, Any]:
    return {'type': 'int', 'num_bits': bits, 'symmetric': True, 'strategy': 'group', 'group_size': 128} | more


_PER_TOKEN = {'type': 'int', 'num_bits': 8, 'symmetric': True, 'strategy': 'token', 'dynamic': True}
_SPARED = {'modules_to_not_convert': ['lm_head']}
_GPTQ: dict[str, Any] = {'quant_method': 'gptq', 'group_size': 128, 'sym': False, 'checkpoint_format': 'gptq_v2'}
QUANTISED: dict[str, dict[str, Any]] = {  # what config.json says of such weights
    'w8a8-int8': {'quant_method': 'smooth_quant', 'quant_dtype': 'int8'} | _SPARED,
    'fp8': {'quant_method': 'smooth_quant', 'quant_dtype': 'float8_e4m3fn'} | _SPARED,
    'fp8-block': {'quant_method': 'fp8', 'fmt': 'e4m3', 'weight_block_size': [128, 128]} | _SPARED,
    'w8a16': _compressed(_integers(8, strategy='channel', group_size=None), 'pack-quantized'),
    'w4a16': {'quant_method': 'awq', 'version': 'gemm', 'bits': 4, 'group_size': 128, 'zero_point': True} | _SPARED,
    'w4a8': _compressed(_integers(4), 'pack-quantized', _PER_TOKEN),
    'w3a16': _GPTQ | {'bits': 3} | _SPARED,
    'w2a16': _GPTQ | {'bits': 2} | _SPARED,
}


def names() -> list[str]:
    """The names after the prefix."""
    return sorted(path.stem for path in FOLDER.glob('*.json'))


def find(model: str) -> Path | None:
    """The config that ``shapes:NAME`` stands for; None: ``model`` is not of that form.

    Raises:
        SourceError: LMD-590: there are no shapes of that name.
    """
    if not model.startswith(PREFIX):
        return None
    name = model.removeprefix(PREFIX)
    if name not in names():
        raise SourceError('LMD-590', name=name, known=', '.join(PREFIX + known for known in names()))
    return FOLDER / f'{name}.json'


def config_alone(model: str) -> Path | None:
    """The folder or the file that ``model`` names, if it is there and holds a config; weights are not asked for."""
    path = Path(model).expanduser()
    if (path / 'config.json').is_file() or path.suffix == '.json' and path.is_file():
        return path
    return None


def quantised(path: Path, name: str, folder: Path) -> Path:
    """A config.json in ``folder``: that of ``path``, with weights as ``name``, a key of QUANTISED, says."""
    config = json.loads((path / 'config.json' if path.is_dir() else path).read_text(encoding='utf-8'))
    made = folder / 'config.json'
    made.write_text(json.dumps(config | {'quantization_config': QUANTISED[name]}), encoding='utf-8')
    return made

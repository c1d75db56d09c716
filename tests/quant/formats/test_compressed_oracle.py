"""What we save, compressed_tensors itself opens, and the other way round: the same weights to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import (
    BaseCompressor,
    FloatQuantizationCompressor,
    IntQuantizationCompressor,
    PackedQuantizationCompressor,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from lmdeploy.config.quantization import read_quantization
from lmdeploy.quant.formats.base import WeightFormat
from lmdeploy.quant.policy import FORMATS
from tests.quant.formats.folders import compressed_config
from tests.quant.formats.test_dense_gguf import saved

OUT, IN = 40, 96
CASES: list[tuple[str, type[BaseCompressor], dict[str, Any]]] = [
    ('pack-quantized', PackedQuantizationCompressor,
     {'num_bits': bits, 'type': 'int', 'symmetric': symmetric, 'strategy': strategy}
     | ({'group_size': 32} if strategy == 'group' else {}))
    for bits in range(2, 9) for symmetric in (True, False) for strategy in ('group', 'channel')
] + [
    ('int-quantized', IntQuantizationCompressor,
     {'num_bits': bits, 'type': 'int', 'symmetric': symmetric, 'strategy': strategy})
    for bits in (4, 8) for symmetric in (True, False) for strategy in ('channel', 'tensor')
] + [
    ('float-quantized', FloatQuantizationCompressor,
     {'num_bits': 8, 'type': 'float', 'symmetric': True, 'strategy': strategy}
     | ({'block_structure': [16, 32]} if strategy == 'block' else {}))
    for strategy in ('channel', 'tensor', 'block')
]  # fmt: skip


def name_of(value: Any) -> str:
    return '-'.join(str(v) for v in value.values()) if isinstance(value, dict) else ''


def parameters(weights: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A random weight with scales and zero points of its strategy."""
    random = torch.Generator().manual_seed(0)
    shape = {'group': (OUT, IN // 32), 'channel': (OUT, 1), 'tensor': (1,), 'block': (-(-OUT // 16), IN // 32)}
    size, half = shape[weights['strategy']], 1 << weights['num_bits'] - 1
    scale = ((torch.rand(size, generator=random) + 0.5) / half).to(dtype)
    out = {'weight': torch.randn(OUT, IN, generator=random).to(dtype), 'weight_scale': scale}
    if not weights['symmetric']:
        out['weight_zero_point'] = torch.randint(-half, half, size, generator=random, dtype=torch.int8)
    return out


@pytest.mark.parametrize(('form', 'compressor', 'weights'), CASES, ids=name_of)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
def test_both_read_each_other(tmp_path: Path, form: str, compressor: type[BaseCompressor], weights: dict[str, Any],
                              dtype: torch.dtype) -> None:
    quantization = read_quantization({'quantization_config': compressed_config(form, weights)})
    assert quantization is not None
    storage = quantization.storage('layer')
    assert storage is not None
    ours: WeightFormat = FORMATS[form](storage)
    scheme = QuantizationScheme(targets=['Linear'], weights=QuantizationArgs(**weights))
    theirs = compressor.compress(parameters(weights, dtype), scheme)
    wanted = compressor.decompress(theirs, scheme)['weight']
    prefix = saved(tmp_path, theirs)
    bundle = ours.load(prefix, dtype)
    prefix.checkpoint.finish()
    assert torch.equal(ours.dequant(bundle).to(dtype), wanted.to(dtype))
    again = ours.save(bundle)
    assert {n: (t.dtype, t.shape) for n, t in again.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    assert all(torch.equal(_bits(tensor), _bits(theirs[name])) for name, tensor in again.items())
    assert torch.equal(compressor.decompress(again, scheme)['weight'], wanted)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor

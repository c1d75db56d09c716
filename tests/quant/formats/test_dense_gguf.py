"""Dense and GGUF storage: load(save(b)) is b, and dequant is the weight that the layer multiplies with."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lmdeploy.errors import LoadError
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.formats.base import WeightFormat
from lmdeploy.quant.formats.dense import DenseFormat
from lmdeploy.quant.formats.gguf import SCHEMES, GGUFFormat, holds_blocks
from lmdeploy.weights.checkpoint import Prefix, open_checkpoint
from lmdeploy.weights.dequant import BLOCK_SIZES, BLOCK_TYPES
from tests.weights.files import write_folder, write_gguf


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Prefix:
    write_folder(folder, {f'layer.{name}': tensor for name, tensor in tensors.items()})
    return open_checkpoint(folder).prefix('layer')


def assert_equal(a: LinearBundle, b: LinearBundle) -> None:
    assert (a.scheme, a.out_features, a.in_features) == (b.scheme, b.out_features, b.in_features)
    for field in ('weight', 'codes', 'scales', 'zeros', 'bias', 'perm'):
        one, two = getattr(a, field), getattr(b, field)
        assert (one is None) == (two is None) and (one is None or (one.dtype == two.dtype and torch.equal(one, two)))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dense_round_trip(tmp_path: Path, bias: bool, dtype: torch.dtype) -> None:
    dense: WeightFormat = DenseFormat()
    tensors = {'weight': torch.randn(4, 6)} | ({'bias': torch.randn(4)} if bias else {})
    assert dense.detect(list(tensors)) and not dense.detect(['qweight', 'scales'])
    prefix = saved(tmp_path / 'a', tensors)
    bundle = dense.load(prefix, dtype)
    prefix.checkpoint.finish()
    assert (bundle.out_features, bundle.in_features, bundle.scheme.bits) == (4, 6, dtype.itemsize * 8)
    assert torch.equal(dense.dequant(bundle), tensors['weight'].to(dtype))
    assert_equal(dense.load(saved(tmp_path / 'b', dense.save(bundle)), dtype), bundle)


def test_dense_checks_shapes(tmp_path: Path) -> None:
    for i, tensors in enumerate(({'weight': torch.ones(4)}, {'weight': torch.ones(4, 2), 'bias': torch.ones(2)})):
        with pytest.raises(LoadError) as caught:
            DenseFormat().load(saved(tmp_path / str(i), tensors), torch.float32)
        assert caught.value.code == 'LMD-133' and 'layer.' in str(caught.value)


@pytest.mark.parametrize('kind', BLOCK_TYPES)
@pytest.mark.parametrize('bias', [True, False])
def test_blocks_round_trip(tmp_path: Path, kind: str, bias: bool) -> None:
    blocks = np.random.default_rng(0).integers(0, 60, (6, 3 * BLOCK_SIZES[kind][1]), dtype=np.uint8)
    tensors = {kind.lower(): torch.from_numpy(blocks)} | ({'bias': torch.ones(6)} if bias else {})
    form: WeightFormat = GGUFFormat()
    assert form.detect(list(tensors)) and not form.detect(['weight', 'bias'])
    bundle = form.load(saved(tmp_path / 'a', tensors), torch.float32)
    assert bundle.scheme == SCHEMES[kind] and bundle.in_features == 3 * BLOCK_SIZES[kind][0]
    wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(form.dequant(bundle).numpy().view(np.uint32), wanted.view(np.uint32))
    assert_equal(form.load(saved(tmp_path / 'b', form.save(bundle)), torch.float32), bundle)


@pytest.mark.parametrize('layer', ['q_proj', 'k_proj', 'v_proj', 'o_proj'])
def test_blocks_of_a_gguf_file(tmp_path: Path, layer: str) -> None:
    """Blocks and dense are two loadings of one weight, permuted rows and all."""
    path = tmp_path / 'x.gguf'
    write_gguf(path, 'llama', bias=True, kind='Q4_0')
    prefix = open_checkpoint(path).prefix(f'model.layers.1.self_attn.{layer}')
    assert holds_blocks(prefix)
    blocks, dense = GGUFFormat().load(prefix, torch.float32), DenseFormat().load(prefix, torch.float32)
    assert blocks.scheme == SCHEMES['Q4_0'] and (blocks.out_features, blocks.in_features) == tuple(dense.weight.shape)
    assert torch.equal(GGUFFormat().dequant(blocks), dense.weight)
    assert (blocks.bias is None) == (dense.bias is None) == (layer == 'o_proj')
    assert blocks.bias is None or torch.equal(blocks.bias, dense.bias)


def test_norms_hold_no_blocks(tmp_path: Path) -> None:
    path = tmp_path / 'x.gguf'
    write_gguf(path, 'llama', kind='Q4_0')
    checkpoint = open_checkpoint(path)
    assert not holds_blocks(checkpoint.prefix('model.norm')) and not holds_blocks(checkpoint.prefix('model'))

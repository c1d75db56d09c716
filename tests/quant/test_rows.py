"""Joining layers and reordering their outputs, for dense and quantised bundles."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.rows import join, take_outputs
from lmdeploy.quant.scheme import QuantScheme, dense_scheme

AWQ = QuantScheme('awq', 4, 4, symmetric=False)


def dense(out: int, bias: bool = False) -> LinearBundle:
    return LinearBundle(dense_scheme(32), out, 8, weight=torch.randn(out, 8), bias=torch.randn(out) if bias else None)


def grouped(out: int) -> LinearBundle:
    return LinearBundle(AWQ, out, 8, codes=torch.randint(0, 16, (8, out)), scales=torch.rand(2, out),
                        zeros=torch.randint(0, 16, (2, out)))  # fmt: skip


def blocks(out: int) -> LinearBundle:
    return LinearBundle(QuantScheme('Q8_0', 8, 32), out, 32, codes=torch.randint(0, 255, (out, 34), dtype=torch.uint8))


def dequant(bundle: LinearBundle) -> torch.Tensor:
    """``[out, in]`` of a dense or grouped bundle."""
    if bundle.weight is not None:
        return bundle.weight
    scales, zeros = (t.repeat_interleave(4, 0) for t in (bundle.scales, bundle.zeros))
    return ((bundle.codes - zeros) * scales).T


@pytest.mark.parametrize('make', [dense, grouped])
def test_join_and_take(make):
    parts = [make(3), make(2), make(4)]
    whole = join(parts)
    assert (whole.out_features, whole.in_features) == (9, 8)
    assert torch.equal(dequant(whole), torch.cat([dequant(p) for p in parts]))
    index = torch.tensor([8, 0, 3])
    assert torch.equal(dequant(take_outputs(whole, index)), dequant(whole)[index])
    assert join(parts[:1]) is parts[0]


def test_blocks_are_rows_of_outputs():
    parts = [blocks(3), blocks(2)]
    assert torch.equal(join(parts).codes, torch.cat([p.codes for p in parts]))
    assert torch.equal(take_outputs(parts[0], torch.tensor([2, 1])).codes, parts[0].codes[[2, 1]])


def test_a_missing_bias_beside_others_is_zero():
    first, second = dense(3, bias=True), dense(2)
    assert torch.equal(join((first, second)).bias, torch.cat((first.bias, torch.zeros(2))))
    assert torch.equal(join((second, first)).bias, torch.cat((torch.zeros(2), first.bias)))
    assert join((second, second)).bias is None


def test_unlike_layers_are_not_joined():
    with pytest.raises(ValueError, match='cannot be joined'):
        join((dense(3), grouped(3)))

"""Joining layers and reordering their outputs, for dense and quantised bundles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.rows import join, take_outputs
from lmdeploy.quant.scheme import QuantScheme, dense_scheme

INT4 = QuantScheme('int', 4, 4, symmetric=False)


def dense(out: int, bias: bool = False) -> LinearBundle:
    return LinearBundle(dense_scheme(32), out, 8, weight=torch.randn(out, 8), bias=torch.randn(out) if bias else None)


def grouped(out: int) -> LinearBundle:
    return LinearBundle(INT4, out, 8, codes=torch.randint(0, 16, (8, out)), scales=torch.rand(2, out),
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
    static = QuantScheme('int', 8, activation='int8', static=True)
    one, other = (replace(grouped(3), scheme=static, input_scale=torch.tensor(scale)) for scale in (0.5, 0.25))
    with pytest.raises(ValueError, match='cannot be joined'):
        join((one, other))
    assert join((one, one)).input_scale == 0.5


def test_layers_that_sort_their_inputs_differently_are_joined_dense():
    first, second = (replace(grouped(3), perm=torch.randperm(8), bias=torch.randn(3)) for _ in range(2))
    whole = join((first, second))
    wanted = []
    for part in (first, second):
        weight = torch.empty(3, 8)
        weight[:, part.perm] = dequant(part)
        wanted.append(weight)
    assert whole.perm is None and whole.scheme.dense and torch.equal(whole.weight, torch.cat(wanted))
    assert torch.equal(whole.bias, torch.cat((first.bias, second.bias)))
    assert torch.equal(join((first, replace(first))).perm, first.perm)
    active = [replace(part, scheme=replace(INT4, activation='int8')) for part in (first, second)]
    with pytest.raises(ValueError, match='sort their inputs differently'):
        join(active)


def test_float8_codes():
    parts = [LinearBundle(QuantScheme('float8_e4m3fn', 8), n, 8, codes=torch.randn(n, 8).to(torch.float8_e4m3fn).t(),
                          scales=torch.rand(1, n)) for n in (3, 2)]
    whole = join(parts)
    assert torch.equal(whole.codes.float(), torch.cat([p.codes.float() for p in parts], 1))
    assert torch.equal(take_outputs(whole, torch.tensor([4, 0])).codes.float(), whole.codes.float()[:, [4, 0]])

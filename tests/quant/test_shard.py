"""Slices of layers: for every format and number of ranks, together they are the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmdeploy.parallel.heads import channels, share_heads
from lmdeploy.parallel.split import share, share_channels
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.dequant import dequantize_bundle
from lmdeploy.quant.scheme import QuantScheme, dense_scheme
from lmdeploy.quant.shard import common_group, slice_inputs, slice_outputs
from lmdeploy.quant.transform import plain_weight, transform
from lmdeploy.weights.dequant import BLOCK_SIZES

SIZES = (1, 2, 3, 4, 8)
NAMES = ('Q4_0', 'Q4_K', 'Q6_K')
HEAD_DIM = 32
HEADS = {'even': (16, 8), 'few keys': (16, 2), 'odd': (14, 2), 'one key': (8, 1)}


def dense(inputs: int, outputs: int) -> LinearBundle:
    return LinearBundle(dense_scheme(32), outputs, inputs, weight=torch.randn(outputs, inputs))


def integers(scheme: QuantScheme):
    def make(inputs: int, outputs: int) -> LinearBundle:
        groups = -(-inputs // (scheme.group or inputs))
        low = -(1 << scheme.bits - 1) if scheme.symmetric else 0
        codes = torch.randint(low, low + (1 << scheme.bits), (inputs, outputs))
        zeros = None if scheme.symmetric else torch.randint(0, 1 << scheme.bits, (groups, outputs), dtype=torch.int16)
        return LinearBundle(scheme, outputs, inputs, codes=codes.to(torch.int8 if scheme.symmetric else torch.uint8),
                            scales=torch.rand(groups, outputs) + 0.1, zeros=zeros)  # fmt: skip

    return make


def float8(scheme: QuantScheme):
    def make(inputs: int, outputs: int) -> LinearBundle:
        groups = -(-inputs // (scheme.group or inputs))
        return LinearBundle(scheme, outputs, inputs, codes=torch.randn(inputs, outputs).to(torch.float8_e4m3fn),
                            scales=torch.rand(groups, outputs) + 0.1)  # fmt: skip

    return make


def blocks(name: str):
    def make(inputs: int, outputs: int) -> LinearBundle:
        elements, nbytes = BLOCK_SIZES[name]
        rows = torch.randint(0, 256, (outputs, -(-inputs // elements), nbytes), dtype=torch.uint8)
        if name.endswith('_K'):  # two halves somewhere among the bytes: make all of them small numbers
            rows &= 0x3B
        else:
            rows[..., 1] &= 0x3B
            rows[..., 3] &= 0x3B
        return LinearBundle(QuantScheme(name, 4), outputs, inputs, codes=rows.flatten(1))

    return make


def sorted_inputs(inputs: int, outputs: int) -> LinearBundle:
    return replace(integers(QuantScheme('int', 4, 64))(inputs, outputs), perm=torch.randperm(inputs))


FORMATS = {
    'dense': dense,
    'awq': integers(QuantScheme('int', 4, 128, symmetric=False)),
    'gptq': integers(QuantScheme('int', 4, 64)),
    'sorted': sorted_inputs,
    'w2': integers(QuantScheme('int', 2, 64, symmetric=False)),
    'w3': integers(QuantScheme('int', 3, 32)),
    'w8a8': integers(QuantScheme('int', 8, activation='int8')),
    'w4a8': integers(QuantScheme('int', 4, 128, activation='int8')),
    'fp8': float8(QuantScheme('float8_e4m3fn', 8, activation='float8_e4m3fn')),
    'fp8 blocks': float8(QuantScheme('float8_e4m3fn', 8, 128, activation='float8_e4m3fn', activation_group=128)),
} | {name: blocks(name) for name in NAMES}


def whole(bundle: LinearBundle) -> torch.Tensor:
    return dequantize_bundle(bundle, torch.float32)


def with_bias(bundle: LinearBundle) -> LinearBundle:
    return replace(bundle, bias=torch.randn(bundle.out_features))


@pytest.fixture(params=FORMATS)
def make(request):
    torch.manual_seed(0)
    return FORMATS[request.param]


@pytest.mark.parametrize('size', SIZES)
def test_outputs_of_channels_and_of_heads(make, size):
    bundle = with_bias(make(256, 448))
    parts = [slice_outputs(bundle, torch.tensor(share_channels(448, rank, size))) for rank in range(size)]
    assert torch.equal(torch.cat([whole(part) for part in parts]), whole(bundle))
    assert torch.equal(torch.cat([part.bias for part in parts]), bundle.bias)
    seen = torch.zeros(448, dtype=torch.int64)
    for rank in range(size):
        index = channels(share_heads(14, 2, rank, size).queries, HEAD_DIM)
        part = slice_outputs(bundle, index)
        there = index >= 0
        assert torch.equal(whole(part)[there], whole(bundle)[index[there]])
        assert torch.equal(part.bias[there], bundle.bias[index[there]])
        assert not whole(part)[~there].any() and not part.bias[~there].any()
        seen[index[there]] += 1
    assert (seen == 1).all()


def check_inputs(bundle: LinearBundle, shares: list[torch.Tensor]) -> list[LinearBundle]:
    """Put the slices' columns back where they come from: that is the layer, and its bias is there once."""
    rebuilt = torch.zeros(bundle.out_features, bundle.in_features)
    slices = [slice_inputs(bundle, shares, rank) for rank in range(len(shares))]
    times = torch.zeros(bundle.in_features, dtype=torch.int64)
    for index, part in zip(shares, slices):
        at = index if part.take is None else part.take
        columns = whole(part.bundle)
        assert columns.shape == (bundle.out_features, len(at)) == (bundle.out_features, part.bundle.in_features)
        assert not columns[:, at < 0].any()
        rebuilt[:, at[at >= 0]] = columns[:, at >= 0]
        times[at[at >= 0]] += 1
    assert (times == 1).all() and torch.equal(rebuilt, whole(bundle))
    assert [part.bundle.bias is not None for part in slices] == [True] + [False] * (len(shares) - 1)
    return [part.bundle for part in slices]


@pytest.mark.parametrize('size', SIZES)
def test_inputs_of_channels(make, size):
    bundle = with_bias(make(1536, 16))
    parts = check_inputs(bundle, [torch.tensor(share_channels(1536, rank, size)) for rank in range(size)])
    if bundle.scheme.group and bundle.perm is None:
        assert all(part.scheme == bundle.scheme for part in parts)  # whole groups


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('heads', HEADS)
def test_inputs_of_heads(make, heads, size):
    queries, keys = HEADS[heads]
    if make in [FORMATS[name] for name in NAMES] and queries * HEAD_DIM % 256:
        return  # such a layer cannot be stored
    bundle = with_bias(make(queries * HEAD_DIM, 16))
    check_inputs(bundle, [channels(share_heads(queries, keys, rank, size).queries, HEAD_DIM) for rank in range(size)])


@pytest.mark.parametrize('size', SIZES)
def test_products_of_slices_add_up(make, size):
    """Over 7 heads of 64 per key as InternVL3-1B has them, whose halves are no whole groups of 128."""
    bundle = with_bias(make(896, 8)) if make not in [FORMATS[name] for name in NAMES] else with_bias(make(768, 8))
    shares = [torch.tensor(share(bundle.in_features, rank, size, 64)) for rank in range(size)]
    x = torch.randn(3, bundle.in_features)
    total = torch.zeros(3, 8)
    for rank in range(size):
        part = slice_inputs(bundle, shares, rank)
        own = x[:, shares[rank] if part.take is None else part.take]
        total += own @ whole(part.bundle).t() + (0 if part.bundle.bias is None else part.bundle.bias)
    wanted = x @ whole(bundle).t() + bundle.bias
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_groups_become_as_small_as_they_must():
    assert common_group(torch.arange(448, 896), 128) == 64
    assert common_group(torch.arange(256, 896), 128) == 128
    assert common_group(torch.cat((torch.arange(32), torch.full((32,), -1), torch.arange(160, 224))), 128) == 64
    assert common_group(torch.arange(32, 160), 128) == 32
    assert common_group(torch.arange(1, 129), 128) == 1
    bundle = FORMATS['awq'](896, 16)
    halves = check_inputs(with_bias(bundle), [torch.arange(448), torch.arange(448, 896)])
    assert [half.scheme.group for half in halves] == [64, 64]
    assert slice_inputs(bundle, [torch.arange(3), torch.arange(3, 896)], 1).bundle.scheme.dense


@pytest.mark.parametrize(('width', 'aligned'), [(128, True), (64, True), (32, False), (24, False)])
@pytest.mark.parametrize('ordered', [True, False])
def test_transformed_inputs(width, aligned, ordered):
    """Ranks' products with their own transformed inputs add up; where blocks are cut through, they are plain ones."""
    torch.manual_seed(0)
    made = integers(QuantScheme('int', 4, 64))(192 if width == 24 else 256, 16)
    bundle = replace(made, input_transform='hadamard:64')
    bundle.scales.mul_(0.1)
    if not ordered:
        bundle.perm = torch.randperm(bundle.in_features)
    shares = list(torch.arange(bundle.in_features).split(width))
    x = torch.randn(5, bundle.in_features)
    wanted = x @ plain_weight(bundle).t()
    total = torch.zeros_like(wanted)
    for rank, index in enumerate(shares):
        part = slice_inputs(bundle, shares, rank)
        assert bool(part.bundle.input_transform) == (aligned and ordered)
        assert part.take is None
        total += transform(x[:, index], part.bundle.input_transform) @ whole(part.bundle).t()
    torch.testing.assert_close(total, wanted, atol=1e-4, rtol=1e-4)
    rounded = replace(bundle, scheme=replace(bundle.scheme, activation='int8'))
    if not (aligned and ordered):
        with pytest.raises(ValueError, match='behind hadamard:64'):
            slice_inputs(rounded, shares, 0)

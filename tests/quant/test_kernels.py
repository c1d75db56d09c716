"""Linear kernels: the choice with its reasons, the product, and bits that do not depend on the other rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lmdeploy.errors import ConfigError
from lmdeploy.ops.cpu import features
from lmdeploy.ops.quantize import quantize_tokens
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.dequant import dequantize_bundle
from lmdeploy.quant.kernels import (
    Dense,
    Interleaved,
    KernelCase,
    Merged,
    PackedDense,
    PackedGated,
    choice,
    choose_gated,
    choose_kernel,
)
from lmdeploy.quant.scheme import QuantScheme, dense_scheme
from lmdeploy.weights.dequant import dequantize
from tests.tolerance import tolerance

CPU = torch.device('cpu')
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if features.packed_linear(dtype)]
SHAPES = [(7, 5), (1, 2), (48, 80), (64, 161), (100, 48), (896, 130), (1536, 64), (4864, 96), (33, 1000)]
ROWS = 150


def layer(out_features: int, in_features: int, dtype=torch.float32, bias: bool = True, seed: int = 0) -> LinearBundle:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    given = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    scheme = dense_scheme(dtype.itemsize * 8)
    return LinearBundle(scheme, out_features, in_features, weight=weight.to(dtype), bias=given)


def case(dtype=torch.float32, scheme=None) -> KernelCase:
    return KernelCase(scheme or dense_scheme(32), dtype, CPU)


def row_groups(dtype) -> list[tuple[int, int]]:
    """Ranges of rows whose products must have the bits that they have among all rows."""
    if not features.stable_rows(dtype):
        return []
    return [(a, a + n) for n in (1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 64, 100) for a in (0, 3, ROWS - n)]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('bias', [False, True])
def test_packed_dense_is_the_product_and_keeps_bits(dtype, shape, bias):
    bundle, kernel = layer(shape[1], shape[0], dtype, bias), PackedDense()
    packed = kernel.pack(bundle, case(dtype))
    x = torch.randn(ROWS, shape[0]).to(dtype)
    found = kernel.apply(x, packed)
    wanted = F.linear(x.double(), bundle.weight.double(), bundle.bias.double() if bias else None)
    torch.testing.assert_close(found.double(), wanted, **tolerance(dtype, length=shape[0]))
    for a, b in row_groups(dtype):
        assert torch.equal(kernel.apply(x[a:b], packed), found[a:b]), (a, b)
    assert kernel.apply(x[:0], packed).shape == (0, shape[1])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('activation', ['silu', 'gelu_tanh'])
def test_packed_gated_equals_merged_and_keeps_bits(dtype, shape, activation):
    gate, up = (layer(shape[1], shape[0], dtype, seed=seed) for seed in (1, 2))
    fast, plain = PackedGated(), Merged()
    packed = fast.pack(gate, up, case(dtype))
    x = torch.randn(ROWS, shape[0]).to(dtype)
    found = fast.apply(x, packed, activation)
    wanted = plain.apply(x, plain.pack(gate, up, case(dtype)), activation)
    torch.testing.assert_close(found, wanted, **tolerance(dtype, float(wanted.abs().max()), shape[0]))
    for a, b in row_groups(dtype):
        assert torch.equal(fast.apply(x[a:b], packed, activation), found[a:b]), (a, b)


def test_choice():
    assert choose_kernel(case()).name == ('onednn_packed' if torch.float32 in DTYPES else 'torch')
    assert choose_kernel(case(torch.float16)).name == 'torch'
    assert choose_gated(case(torch.float16)).name == 'merged'
    assert choose_gated(case(torch.float16, dense_scheme(16))).name == 'merged'
    elsewhere = KernelCase(dense_scheme(16), torch.bfloat16, torch.device('meta'))
    assert choose_kernel(elsewhere).name == 'torch'
    assert 'runs on cpu' in PackedDense().refuse(elsewhere)


def test_choice_on_a_gpu():
    pytest.importorskip('triton', reason='triton is made for Linux on x86-64')

    def gated(dtype, width):
        return choose_gated(KernelCase(dense_scheme(16), dtype, torch.device('cuda'), width)).name

    assert gated(torch.bfloat16, 96) == gated(torch.float16, 0) == 'interleaved'
    assert gated(torch.float32, 96) == gated(torch.bfloat16, 100) == 'merged'
    bfloat16 = KernelCase(dense_scheme(16), torch.bfloat16, torch.device('cuda'))
    assert choose_kernel(bfloat16).name == 'torch' and not Dense().rounds(bfloat16)
    assert Dense().rounds(KernelCase(dense_scheme(16), torch.bfloat16, torch.device('meta')))


@pytest.mark.parametrize('biases', [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize('activation', ['silu', 'gelu_tanh'])
def test_interleaved_equals_merged(biases, activation):
    gate, up = layer(48, 80, seed=1, bias=biases[0]), layer(48, 80, seed=2, bias=biases[1])
    x = torch.randn(ROWS, 80)
    found = Interleaved().apply(x, Interleaved().pack(gate, up, case()), activation)
    wanted = Merged().apply(x, Merged().pack(gate, up, case()), activation)
    torch.testing.assert_close(found, wanted, **tolerance(torch.float32, float(wanted.abs().max()), 80))


def quantised(bits: int, group: int, activation: str, symmetric: bool, bias: bool) -> LinearBundle:
    """A random layer of 80 inputs and 33 outputs."""
    random = torch.Generator().manual_seed(0)
    groups, least = -(-80 // group) if group else 1, 0 if not symmetric else -(1 << bits - 1)
    codes = torch.randint(least, least + (1 << bits), (80, 33), generator=random)
    zeros = None if symmetric else torch.randint(0, 1 << bits, (groups, 33), generator=random, dtype=torch.int16)
    return LinearBundle(QuantScheme('int', bits, group, symmetric, activation), 33, 80,
                        codes=codes.to(torch.int8 if symmetric else torch.uint8), zeros=zeros,
                        scales=torch.rand(groups, 33, generator=random) / (1 << bits),
                        bias=torch.randn(33, generator=random) if bias else None)  # fmt: skip


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('group', [0, 16, 32])
@pytest.mark.parametrize('symmetric', [True, False])
def test_weights_only_are_dequantised_once(bits, group, symmetric):
    bundle = quantised(bits, group, '', symmetric, bias=True)
    one = case(scheme=bundle.scheme)
    kernel = choose_kernel(one)
    assert kernel.name == 'dequantised' and not kernel.rounds(one)
    x = torch.randn(9, 80)
    dense = LinearBundle(dense_scheme(32), 33, 80, weight=dequantize_bundle(bundle, torch.float32), bias=bundle.bias)
    inner = choose_kernel(case())
    wanted = inner.apply(x, inner.pack(dense, case()))
    assert torch.equal(kernel.apply(x, kernel.pack(bundle, one)), wanted)
    assert torch.equal(kernel.apply_float(x, kernel.pack(bundle, one)), wanted)
    if features.packed_linear(torch.bfloat16):
        assert kernel.rounds(case(torch.bfloat16, bundle.scheme))


def test_blocks_of_gguf_are_dequantised():
    blocks = torch.randint(0, 60, (12, 3 * 34), dtype=torch.uint8)
    bundle = LinearBundle(QuantScheme('Q8_0', 8, 32), 12, 96, codes=blocks)
    one = case(scheme=bundle.scheme)
    kernel, x = choose_kernel(one), torch.randn(5, 96)
    wanted = F.linear(x.double(), dequantize(blocks, 'Q8_0').double())
    allowed = tolerance(torch.float32, float(wanted.abs().max()), 96)
    torch.testing.assert_close(kernel.apply(x, kernel.pack(bundle, one)).double(), wanted, **allowed)


@pytest.mark.parametrize('dtype', [*DTYPES, torch.float16])
@pytest.mark.parametrize(('bits', 'group', 'symmetric'), [(8, 0, True), (4, 16, True), (4, 32, False), (8, 0, False)])
@pytest.mark.parametrize('bias', [True, False])
def test_quantised_inputs_by_integers(dtype, bits, group, symmetric, bias):
    """The product of integers, group by group, is what the kernel computes in floating point."""
    bundle = quantised(bits, group, 'int8', symmetric, bias)
    one = case(dtype, bundle.scheme)
    kernel = choose_kernel(one)
    integers = bits == 8 and symmetric and features.int8_dot()
    packed = bits == 4 and not group % 32 and dtype is torch.bfloat16 and features.packed_codes()
    assert kernel.name == ('onednn_int8' if integers else 'cpu_int4_inputs' if packed else 'quantised_input')
    x = (torch.randn(9, 80) * 3).to(dtype)
    codes, scales = quantize_tokens(x, 'int8', 0)
    wanted, size = torch.zeros(9, 33, dtype=torch.float64), group or 80
    for g, at in enumerate(range(0, 80, size)):
        weight = bundle.codes[at : at + size].long() - (0 if bundle.zeros is None else bundle.zeros[g].long())
        wanted += (codes[:, at : at + size].long() @ weight).double() * bundle.scales[g].double()
    wanted = wanted * scales.double() + (0 if bundle.bias is None else bundle.bias.double())
    packed = kernel.pack(bundle, one)
    found = kernel.apply_float(x, packed)
    assert found.dtype == torch.float32 and kernel.apply(x, packed).dtype == dtype
    allowed = tolerance(torch.bfloat16 if dtype is torch.bfloat16 else torch.float32, float(wanted.abs().max()), 80)
    torch.testing.assert_close(found.double(), wanted, **allowed)
    assert kernel.apply(x[:0], packed).shape == (0, 33)
    for a, b in row_groups(torch.float32 if dtype is torch.float16 else dtype):
        if b <= 9:
            assert torch.equal(kernel.apply_float(x[a:b], packed), found[a:b]), (a, b)


@pytest.mark.parametrize('activation', ['', 'int8'])
def test_gated_layers_of_quantised_weights(activation):
    gate, up = (quantised(4, 16, activation, False, bias=False) for _ in range(2))
    up.codes = up.codes.flip(0)
    one = case(scheme=gate.scheme)
    kernel, single = choose_gated(one), choose_kernel(one)
    assert kernel.name == ('merged' if activation else 'dequantised')
    x = torch.randn(6, 80)
    found = kernel.apply(x, kernel.pack(gate, up, one), 'silu')
    both = [single.apply(x, single.pack(part, one)) for part in (gate, up)]
    wanted = F.silu(both[0]) * both[1]
    torch.testing.assert_close(found, wanted, **tolerance(torch.float32, float(wanted.abs().max()), 80))


def test_no_kernel_is_an_error_with_all_reasons():
    reasons = 'LMD-118.*onednn_packed: needs a dense weight; torch: needs a dense weight; .*dequantised: knows int'
    with pytest.raises(ConfigError, match=reasons) as caught:
        choose_kernel(case(scheme=QuantScheme('trellis', 2)))
    assert 'trellis' in caught.value.text('zh')


def test_a_users_kernel_goes_first(monkeypatch):
    class Mine(Dense):
        name = 'mine'

    monkeypatch.setattr(choice, 'LINEAR', [Mine(), *choice.LINEAR])
    assert choose_kernel(case()).name == 'mine'

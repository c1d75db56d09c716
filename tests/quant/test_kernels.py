"""Linear kernels: the choice with its reasons, the product, and bits that do not depend on the other rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lmdeploy.errors import ConfigError
from lmdeploy.ops.cpu import features
from lmdeploy.quant import kernels
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.kernels import (
    Dense,
    Interleaved,
    KernelCase,
    Merged,
    PackedDense,
    PackedGated,
    choose_gated,
    choose_kernel,
)
from lmdeploy.quant.scheme import QuantScheme, dense_scheme
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


def test_no_kernel_is_an_error_with_all_reasons():
    reasons = 'LMD-118.*onednn_packed: needs a dense weight; torch: needs a dense weight; dequantised: knows int'
    with pytest.raises(ConfigError, match=reasons) as caught:
        choose_kernel(case(scheme=QuantScheme('trellis', 2)))
    assert 'trellis' in caught.value.text('zh')


def test_a_users_kernel_goes_first(monkeypatch):
    class Mine(Dense):
        name = 'mine'

    monkeypatch.setattr(kernels, 'LINEAR', [Mine(), *kernels.LINEAR])
    assert choose_kernel(case()).name == 'mine'

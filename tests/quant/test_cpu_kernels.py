"""Products with codes on CPUs: what they give, how far off it may be, which bits are the same, how much memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmdeploy.nn.build import Build
from lmdeploy.nn.linear import Linear
from lmdeploy.ops.cpu import features, int4, int8
from lmdeploy.ops.quantize import quantize_tokens
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.dequant import dequantize_bundle
from lmdeploy.quant.kernels import (
    Int4,
    Int4Inputs,
    Int8,
    Int8Inputs,
    KernelCase,
    LinearKernel,
    WideInt8,
    choose_gated,
    choose_kernel,
    explain,
)
from lmdeploy.quant.scheme import QuantScheme

ROWS = (1, 2, 7, 8, 9, 33, 256)
HALF = 2.0**-8  # of a number: what rounding it to bfloat16 changes at most
CPU = torch.device('cpu')
BF16 = torch.bfloat16

needs_packed = pytest.mark.skipif(not features.packed_codes(), reason='no vector instructions for packed codes')
needs_dot = pytest.mark.skipif(not features.int8_dot(), reason='no instructions for products of 8-bit integers')


def layer(bits: int, group: int, symmetric: bool, out: int, inputs: int, *, activation: str = '', bias: bool = False,
          perm: bool = False) -> LinearBundle:  # fmt: skip
    """Random codes; scales as a weight of deviation about 1 has them."""
    generator = torch.Generator().manual_seed(bits * 1000 + group + out)
    half, groups = 1 << bits - 1, -(-inputs // group) if group else 1
    codes = torch.randint(0, 2 * half, (inputs, out), generator=generator, dtype=torch.uint8)
    zeros = None if symmetric else torch.randint(0, 2 * half, (groups, out), generator=generator, dtype=torch.int16)
    scales = (torch.rand(groups, out, generator=generator) + 0.5) / half
    scheme = QuantScheme('int', bits, group, symmetric, activation)
    return LinearBundle(
        scheme, out, inputs, codes=(codes.int() - half).to(torch.int8) if symmetric else codes, scales=scales,
        zeros=zeros, bias=torch.randn(out, generator=generator) if bias else None,
        perm=torch.randperm(inputs, generator=generator) if perm else None)  # fmt: skip


def case(bundle: LinearBundle, dtype: torch.dtype = BF16) -> KernelCase:
    return KernelCase(bundle.scheme, dtype, CPU, bundle.out_features, bundle.in_features)


def inputs_of(bundle: LinearBundle, rows: int) -> Tensor:
    return torch.randn(rows, bundle.in_features, generator=torch.Generator().manual_seed(rows)).to(BF16)


def wanted_and_slack(bundle: LinearBundle, x: Tensor) -> tuple[Tensor, Tensor]:
    """The exact product of the dense weight, and how far the rounding of numbers of the weight may move it.

    Rounded to bfloat16 are each scale and each offset, ``8 - zero`` scales; and, where tiles are unpacked, weights.
    """
    weight = dequantize_bundle(bundle, torch.float32).double()
    plain = replace(bundle, zeros=None, scheme=replace(bundle.scheme, symmetric=True), bias=None)
    if bundle.zeros is None:
        numbers = weight.abs()
    else:
        assert bundle.codes is not None
        plain.codes = (bundle.codes.int() - 8).abs().to(torch.int8)
        codes = dequantize_bundle(plain, torch.float32).double()
        plain.codes = torch.ones_like(plain.codes)
        scales = dequantize_bundle(plain, torch.float32).double()
        numbers = codes + scales * 8
    y = x.double() @ weight.t()
    if bundle.bias is not None:
        y += bundle.bias.double()
    slack = x.double().abs() @ (numbers + weight.abs()).t() * HALF
    return y, slack


INT4 = [(4, 32, False, 70, 96), (4, 64, True, 33, 200), (4, 128, False, 64, 256), (4, 256, True, 130, 512),
        (4, 96, False, 5, 192), (4, 0, True, 48, 100), (3, 32, True, 64, 64), (2, 64, False, 96, 192),
        (4, 1024, True, 7, 1100)]  # fmt: skip


@needs_packed
@pytest.mark.parametrize(('bits', 'group', 'symmetric', 'out', 'inputs'), INT4)
@pytest.mark.parametrize('more', [False, True])
def test_four_bits_are_the_dense_product_but_for_rounded_scales(bits, group, symmetric, out, inputs, more):
    bundle = layer(bits, group, symmetric, out, inputs, bias=more, perm=more)
    kernel = choose_kernel(case(bundle))
    assert isinstance(kernel, Int4)
    packed = kernel.pack(bundle, case(bundle))
    for rows in ROWS:
        x = inputs_of(bundle, rows)
        wanted, slack = wanted_and_slack(bundle, x)
        found = kernel.apply(x, packed)
        assert found.dtype == BF16 and found.shape == (rows, out) and found.is_contiguous()
        allowed = slack + 2 * HALF * (wanted.abs() + slack) + (2 * HALF * bundle.bias.abs() if more else 0) + 1e-5
        assert ((found.double() - wanted).abs() <= allowed).all(), rows
        assert torch.equal(kernel.apply_float(x, packed), found.float())
    assert kernel.apply(x[:0], packed).shape == (0, out)


@needs_packed
def test_numbers_that_bfloat16_holds_are_multiplied_exactly():
    """With scales that are powers of two and zeros in the middle, float32 sums are all that is left of rounding."""
    bundle = layer(4, 64, True, 64, 128)
    bundle.scales = 2.0 ** torch.randint(-4, 2, bundle.scales.shape)
    kernel = Int4()
    packed = kernel.pack(bundle, case(bundle))
    assert torch.equal(int4.unpack_int4(packed).t().float(), dequantize_bundle(bundle, torch.float32))
    x = torch.randint(-8, 9, (100, 128)).to(BF16)
    wanted = (x.double() @ dequantize_bundle(bundle, torch.float32).double().t()).to(BF16)
    for rows in (1, 5, 100):
        assert torch.equal(kernel.apply(x[:rows], packed), wanted[:rows])


@needs_packed
def test_a_row_of_four_bits_depends_on_the_way_it_is_multiplied_alone():
    bundle = layer(4, 32, False, 70, 96, bias=True)
    kernel = Int4()
    packed, x = kernel.pack(bundle, case(bundle)), inputs_of(bundle, 200)
    few = kernel.apply(x[: int4.FEW_ROWS], packed)
    for a, b in ((0, 1), (3, 5), (7, 16), (9, int4.FEW_ROWS)):
        assert torch.equal(kernel.apply(x[a:b], packed), few[a:b])
    if features.stable_rows(BF16):
        many = kernel.apply(x, packed)
        for a, b in ((0, int4.FEW_ROWS + 1), (5, 130), (60, 200)):
            assert torch.equal(kernel.apply(x[a:b], packed), many[a:b])


KERNELS = [pytest.param(WideInt8(), marks=needs_dot), pytest.param(Int8(), marks=needs_packed)]
INT8 = [(33, 200), (64, 96), (130, 33), (5, 7), (96, 512)]


@pytest.mark.parametrize(('out', 'inputs'), INT8)
@pytest.mark.parametrize('more', [False, True])
@pytest.mark.parametrize('kernel', KERNELS, ids=lambda kernel: kernel.name)
def test_eight_bits_are_the_dense_product(kernel: LinearKernel, out: int, inputs: int, more: bool):
    bundle = layer(8, 0, True, out, inputs, bias=more, perm=more)
    wide = isinstance(kernel, WideInt8)
    assert not kernel.refuse(case(bundle))
    packed = kernel.pack(bundle, case(bundle))
    for rows in ROWS:
        x = inputs_of(bundle, rows)
        wanted, slack = wanted_and_slack(bundle, x)
        if wide:  # inputs are off by half a step of 1/32512 of the largest, scales are not rounded
            weight = dequantize_bundle(bundle, torch.float32).double().abs()
            slack = x.double().abs().amax(1, keepdim=True) / 65024 * weight.sum(1) + 1e-6 * slack / HALF
        found = kernel.apply_float(x, packed)
        assert found.dtype == torch.float32 and kernel.apply(x, packed).dtype == BF16
        allowed = slack + (0 if wide else 3 * HALF * (wanted.abs() + slack)) + 1e-5
        if more and not wide:
            allowed += 2 * HALF * bundle.bias.abs()
        assert ((found.double() - wanted).abs() <= allowed).all(), rows
    assert kernel.apply(x[:0], packed).shape == (0, out)


@needs_dot
def test_integers_have_the_same_bits_in_any_batch():
    bundle = layer(8, 0, True, 130, 200, bias=True)
    for kernel, activation in ((WideInt8(), ''), (Int8Inputs(), 'int8')):
        one = case(replace(bundle, scheme=replace(bundle.scheme, activation=activation)))
        assert choose_kernel(one).name == kernel.name
        packed, x = kernel.pack(bundle, one), inputs_of(bundle, 200) * 100
        x[3] = 0
        whole = kernel.apply_float(x, packed)
        assert torch.equal(whole[3], bundle.bias)
        for a, b in ((0, 1), (1, 3), (3, 10), (60, 130), (7, 200)):
            assert torch.equal(kernel.apply_float(x[a:b], packed), whole[a:b])


@needs_dot
def test_what_is_not_finite_stays_so():
    bundle = layer(8, 0, True, 16, 32)
    kernel, x = WideInt8(), inputs_of(bundle, 3)
    x[0, 5], x[1, 5] = float('nan'), float('inf')
    found = kernel.apply_float(x, kernel.pack(bundle, case(bundle)))
    assert not found[:2].isfinite().any() and found[2].isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize('static', [False, True])
@needs_dot
def test_inputs_of_eight_bits_are_multiplied_as_integers(dtype, static):
    bundle = layer(8, 0, True, 65, 130, activation='int8', bias=True, perm=True)
    if static:
        bundle.input_scale, bundle.scheme = torch.tensor(0.03), replace(bundle.scheme, static=True)
    kernel = choose_kernel(case(bundle, dtype))
    assert isinstance(kernel, Int8Inputs)
    packed = kernel.pack(bundle, case(bundle, dtype))
    for rows in ROWS:
        x = inputs_of(bundle, rows).to(dtype)
        codes, scales = quantize_tokens(x[:, bundle.perm], 'int8', 0)
        if static:
            codes, scales = (x[:, bundle.perm].float() / 0.03).round().clamp(-127, 127), torch.tensor([[0.03]])
        wanted = codes.double() @ bundle.codes.double() * bundle.scales.double() * scales.double()
        wanted += bundle.bias.double()
        torch.testing.assert_close(kernel.apply_float(x, packed).double(), wanted, rtol=1e-5, atol=1e-5)
        assert kernel.apply(x, packed).dtype == dtype


@needs_packed
def test_four_bits_times_inputs_of_eight():
    bundle = layer(4, 128, True, 65, 256, activation='int8', bias=True)
    kernel = choose_kernel(case(bundle))
    assert isinstance(kernel, Int4Inputs)
    packed = kernel.pack(bundle, case(bundle))
    weight = replace(bundle, bias=None, scheme=replace(bundle.scheme, activation=''))
    for rows in ROWS:
        x = inputs_of(bundle, rows)
        codes, scales = quantize_tokens(x, 'int8', 0)
        wanted, slack = wanted_and_slack(weight, codes)
        wanted, slack = wanted * scales.double(), (slack + HALF * (wanted.abs() + slack)) * scales.double()
        found = kernel.apply_float(x, packed).double()
        assert ((found - wanted - bundle.bias.double()).abs() <= slack + 1e-5).all()


def test_reasons_are_told():
    grouped = layer(8, 32, True, 8, 64)
    odd = layer(4, 16, True, 8, 64)
    lines = explain(case(grouped)).splitlines() + explain(case(odd)).splitlines()
    text = '\n'.join(lines)
    assert 'cpu_int4: needs groups of a multiple of 32 channels, not of 16' in text
    assert 'cpu_int8: needs symmetric integers of 8 bits with one scale for each output' in text
    assert 'onednn_int8: quantises inputs to int8, token by token' in text
    assert choose_kernel(case(odd)).name == choose_kernel(case(grouped)).name == 'dequantised'
    plain = layer(4, 64, True, 8, 64)
    assert 'cpu_int4: computes in bfloat16, not in torch.float32' in explain(case(plain, torch.float32))
    assert choose_kernel(case(plain, torch.float32)).name == 'dequantised'
    elsewhere = replace(case(plain), device=torch.device('meta'))
    assert 'runs on cpu' in Int4().refuse(elsewhere) and 'runs on cpu' in Int8Inputs().refuse(elsewhere)


def test_processors_without_the_instructions_use_what_they_have(monkeypatch):
    four, eight = layer(4, 64, False, 8, 64), layer(8, 0, True, 8, 64)
    both = layer(8, 0, True, 8, 64, activation='int8')
    monkeypatch.setattr(features, 'int8_dot', lambda: False)
    monkeypatch.setattr(features, 'packed_codes', lambda: True)
    assert [choose_kernel(case(one)).name for one in (four, eight, both)] == ['cpu_int4', 'cpu_int8', 'quantised_input']
    assert choose_gated(case(four)).name == 'merged'
    monkeypatch.setattr(features, 'packed_codes', lambda: False)
    assert [choose_kernel(case(one)).name for one in (four, eight)] == ['dequantised', 'dequantised']
    assert choose_gated(case(four)).name == 'dequantised'


CHECK = """
import torch
from lmdeploy.ops.cpu import int4
codes = torch.randint(0, 16, (130, 96), dtype=torch.uint8)
scales, offsets = torch.rand(3, 130) + 0.5, torch.randn(3, 130)
spread = lambda t: t.bfloat16().float().repeat_interleave(32, 0).t()
wanted = (codes.float() - 8) * spread(scales) + spread(offsets)
packed = int4.pack_int4(codes, scales, offsets, 32)
assert torch.equal(int4.unpack_int4(packed).t()[:130].float(), wanted.bfloat16().float()), 'unpacked'
x = torch.randn(60, 96).bfloat16()
for rows in (3, 60):
    y = x[:rows].float() @ wanted.t()
    assert (int4.int4_linear(x[:rows], packed).float() - y).abs().max() < 0.01 * y.abs().max(), rows
print(torch.backends.cpu.get_cpu_capability(), int4._layout().block)
"""


@pytest.mark.parametrize('capability', ['default', 'avx2'])
def test_the_layout_of_other_instruction_sets_is_found_out(capability):
    """torch packs in another order where it does not use AVX512."""
    run = subprocess.run([sys.executable, '-c', CHECK], capture_output=True, text=True, timeout=120,
                         env=os.environ | {'ATEN_CPU_CAPABILITY': capability, 'OMP_NUM_THREADS': '1'})  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] in ('16', '32', '64')


@needs_packed
def test_weights_take_the_memory_of_their_codes():
    """4.25 bits a weight in groups of 128 (a scale and an offset of 16 bits), 8 bits and a scale an output."""
    four, eight = layer(4, 128, False, 256, 512, bias=True), layer(8, 0, True, 256, 512)
    packed = Int4().pack(four, case(four))
    assert packed.nbytes == 256 * 512 // 2 + 256 * 512 // 128 * 4 + 256 * 2
    assert Int8().pack(eight, case(eight)).nbytes == 256 * 512 + 256 * 2
    if features.int8_dot():
        assert WideInt8().pack(eight, case(eight)).weight.nbytes == 256 * 512 + 256 * 4
    linear = Linear(Build(BF16), 512, (256,))
    linear.set(four)
    assert linear._packed.nbytes == packed.nbytes


def test_rows_are_those_that_are_multiplied():
    bundle = layer(8, 0, True, 33, 20, perm=True)
    kernel, ids = Int8(), torch.tensor([3, 32, 0])
    wanted = dequantize_bundle(replace(bundle, scales=bundle.scales.to(BF16).float()), torch.float32)[ids]
    assert torch.equal(kernel.rows(ids, kernel.pack(bundle, case(bundle))), wanted)
    assert int8.pack_int8(bundle.codes.t(), bundle.scales[0]).codes.shape == (36, 32)

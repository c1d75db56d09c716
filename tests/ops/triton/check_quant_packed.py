"""Products with packed codes: every width, group and split, against the dequantised reference."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.ops.linear import interleave
from lmdeploy.ops.packed_linear import (
    CODES,
    WIDTH,
    PackedWeight,
    pack,
    packed_codes_linear,
    packed_linear,
    unpack,
)
from lmdeploy.ops.quantize import quantize_tokens, turn
from lmdeploy.ops.triton import quant_packed, quant_packed_codes, quant_scaled
from lmdeploy.ops.triton.quant_packed import PackedConfig, packed_gemm
from lmdeploy.ops.triton.quant_packed_codes import packed_codes_gemm
from lmdeploy.ops.triton.quantize import triton_quantize_tokens
from tests.ops.triton.conftest import INTERPRETED

HALF = torch.float16 if INTERPRETED else torch.bfloat16
ERROR = 2e-3 if INTERPRETED else 8e-3  # of the norm: a rounding of the result is half a step
CONFIGS = [PackedConfig(64, 16, 1, 3), PackedConfig(128, 32, 3, 4, 4096)]


def codes_of(bits: int, n: int, k: int, group: int, zeros: bool, float8: str, device, dtype=HALF, **options):
    """Random codes, and the weight ``[n, k]`` that they stand for."""
    draw = torch.Generator().manual_seed(bits + n + k)
    rows = -(-k // group) if group else 1
    scales = (torch.rand(rows, n, generator=draw) + 0.5).to(torch.float16) / 16
    if float8:
        codes = torch.randn(k, n, generator=draw).to(getattr(torch, float8))
    elif zeros:
        codes = torch.randint(0, 1 << bits, (k, n), generator=draw, dtype=torch.uint8)
    else:
        codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (k, n), generator=draw, dtype=torch.int8)
    points = torch.randint(0, 1 << bits, (rows, n), generator=draw, dtype=torch.int16) if zeros else None

    def spread(values):
        return values.float().repeat_interleave(group or k, 0)[:k]

    weight = codes.float() - (spread(points) if zeros else 0)
    weight = (weight * spread(scales)).t().contiguous()
    packed = pack(codes.to(device), scales.to(device), None if points is None else points.to(device), None, bits, group,
                  dtype, float8=float8, **options)  # fmt: skip
    return packed, weight.to(device)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


WEIGHTS = [(4, 128, True, ''), (4, 32, False, ''), (4, 64, True, ''), (2, 64, True, ''), (2, 128, False, ''),
           (3, 128, True, ''), (3, 0, False, ''), (8, 0, False, ''), (8, 128, True, ''), (5, 32, True, ''),
           (8, 0, False, 'float8_e4m3fn'), (8, 128, False, 'float8_e4m3fn'), (8, 0, False, 'float8_e5m2')]  # fmt: skip


@pytest.mark.parametrize(('bits', 'group', 'zeros', 'float8'), WEIGHTS)
@pytest.mark.parametrize('config', CONFIGS, ids=str)
def test_products(bits, group, zeros, float8, config, device):
    n, k, rows = 136, 352, 3
    packed, weight = codes_of(bits, n, k, group, zeros, float8, device)
    assert torch.equal(unpack(packed, torch.float32), weight)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(1)).to(device, HALF)
    wanted = x.float() @ weight.t()
    exact = packed_gemm(x, packed, config, out=torch.empty(rows, n, device=device), pdl=not INTERPRETED)
    assert off(exact, wanted) < 2e-5
    found = packed_gemm(x, packed, config, pdl=not INTERPRETED)
    assert found.dtype is HALF and off(found, wanted) < ERROR
    assert off(packed_linear.reference(x, packed, '', True), wanted) < 1e-5


@pytest.mark.parametrize('rows', [16, 70])
def test_more_rows_than_a_program_has(rows, device):
    packed, weight = codes_of(4, 96, 256, 128, True, '', device)
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(device, HALF)
    for columns, split in ((16, 1), (16, 2), (64, 1)):
        found = packed_gemm(x, packed, PackedConfig(64, columns, split, 2), pdl=not INTERPRETED)
        assert off(found, x.float() @ weight.t()) < ERROR


def test_gated_products(device):
    n, k = 64, 256
    parts = [codes_of(4, n, k, 64, True, '', 'cpu') for _ in range(1)]
    assert isinstance(parts[0][0], PackedWeight)
    draw = torch.Generator().manual_seed(3)
    gate, up = (torch.randint(0, 16, (n, k), generator=draw, dtype=torch.uint8) for _ in range(2))
    scales = [torch.rand(n, 4, generator=draw).half() / 16 for _ in range(2)]
    codes, both = interleave(gate, up).t().contiguous(), interleave(*scales).t().contiguous()
    zeros = torch.full_like(both, 7, dtype=torch.int16)
    packed = pack(codes.to(device), both.to(device), zeros.to(device), None, 4, 64, HALF, gated=True)
    x = torch.randn(3, k, generator=draw).to(device, HALF)
    sides = [(c.float() - 7) * s.float().repeat_interleave(64, 1) for c, s in zip((gate, up), scales)]
    for name, activation in ACTIVATIONS.items():
        wanted = activation.reference(torch.cat([x.cpu().float() @ side.t() for side in sides], -1))
        found = packed_gemm(x, packed, CONFIGS[0], name, pdl=not INTERPRETED)
        assert off(found.cpu(), wanted) < ERROR
        assert off(packed_linear.reference(x, packed, name, False).cpu(), wanted) < ERROR


@pytest.mark.parametrize(('bits', 'zeros', 'float8', 'split', 'columns'), [
    (4, True, '', 1, 16), (4, False, '', 2, 32), (8, False, '', 2, 32), (8, False, 'float8_e4m3fn', 1, 32)])
def test_products_with_inputs_of_8_bits(bits, zeros, float8, split, columns, device):
    n, k, rows = 136, 400, 20
    packed, weight = codes_of(bits, n, k, 128 if bits == 4 else 0, zeros, float8, device)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(1)).to(device, HALF)
    codes, scales = quantize_tokens.reference(x, float8 or 'int8', 0)
    turned = turn(codes)
    if not float8:
        assert torch.equal(triton_quantize_tokens(x, 'int8', 0, True)[0], turned)
    wanted = (codes.double() @ weight.double().t()) * scales
    out = torch.empty(rows, n, device=device)
    found = packed_codes_gemm(turned, scales, packed, PackedConfig(64, columns, split, 3), out, pdl=not INTERPRETED)
    assert off(found, wanted) < (1e-3 if float8 else 1e-6)  # the tensor cores add float8 in fewer bits
    assert off(packed_codes_linear.reference(turned, scales, packed, '', torch.float32), wanted) < 1e-5


@pytest.mark.parametrize('rows', [16, 64, 128, 256, 1024])
@pytest.mark.parametrize(('n', 'k'), [(896, 896), (4096, 14336), (28672, 4096), (128256, 4096), (8, 32)])
def test_the_default_fits_shared_memory_and_the_shape(n, k, rows):
    for bits, codes in CODES.items():
        config = quant_packed.default(bits, n, k, rows, 132)
        assert (config.block_n * WIDTH + config.columns * WIDTH * codes) * 2 * config.stages <= 227 * 1024
        assert config.split == 1 or config.split * codes * WIDTH <= k
    config = quant_packed_codes.choose(n, k, rows)
    assert (config.block_n * WIDTH * 2 + config.columns * 4 * WIDTH) * config.stages <= 227 * 1024


def test_the_measured_configurations_are_sound():
    for table in (quant_packed._tuned(), quant_packed_codes._tuned()):
        for shape, config in table.items():
            assert config.block_n in (64, 128) and config.columns >= 16 and config.split >= 1, shape
    for shape, config in quant_scaled._tuned().items():
        assert len(config) in (5, 6) and shape.split('/')[0] in ('int8', 'float8', 'groups'), shape

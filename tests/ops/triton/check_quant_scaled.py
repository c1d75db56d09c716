"""Products of codes of 8 bits on both sides, for few rows and for many, against the reference."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.ops.linear import interleave
from lmdeploy.ops.quantize import quantize_tokens
from lmdeploy.ops.scaled_linear import ScaledWeight, scaled_linear
from lmdeploy.ops.triton.quant_scaled import FewConfig, ManyConfig, few_gemm, many_gemm
from tests.ops.triton.conftest import INTERPRETED

FEW = [FewConfig(64, 128, 1, 4, 3), FewConfig(64, 128, 2, 4, 4, 128)]
KINDS = [('int8', 0, 0), ('float8_e4m3fn', 0, 0), ('float8_e4m3fn', 128, 128), ('int8', 128, 0)]


def operands(rows: int, n: int, k: int, kind: str, group: int, x_group: int, device):
    draw = torch.Generator().manual_seed(n + k)
    x, bias = torch.randn(rows, k, generator=draw), torch.randn(n, generator=draw)
    weight = torch.randn(n, k, generator=draw) / k**0.5
    codes, scales = quantize_tokens.reference(weight, kind, group)
    inputs = [t.to(device) for t in quantize_tokens.reference(x, kind, x_group)]
    packed = ScaledWeight(codes.to(device), scales.t().contiguous().to(device), bias.to(device), group)
    return *inputs, packed


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize(('kind', 'group', 'x_group'), KINDS)
@pytest.mark.parametrize('config', FEW, ids=str)
def test_few_rows(kind, group, x_group, config, device):
    codes, scales, weight = operands(3, 96, 400, kind, group, x_group, device)
    wanted = scaled_linear.reference(codes, scales, weight, '', torch.float32)
    out = torch.empty(3, 96, device=device)
    found = few_gemm(codes, scales, weight, config, out, pdl=not INTERPRETED)
    assert off(found, wanted) < (1e-6 if kind == 'int8' else 1e-3)  # the tensor cores add float8 in fewer bits


def test_gated(device):
    codes, scales, weight = operands(3, 128, 256, 'int8', 0, 0, device)
    both = ScaledWeight(interleave(*weight.codes.chunk(2)), interleave(*weight.scales[0].chunk(2))[None],
                        interleave(*weight.bias.chunk(2)), 0, True)  # fmt: skip
    wanted = scaled_linear.reference(codes, scales, both, 'silu', torch.float32)
    found = few_gemm(codes, scales, both, FEW[1], torch.empty(3, 64, device=device), 'silu', pdl=not INTERPRETED)
    assert off(found, wanted) < 1e-5


@pytest.mark.parametrize(('kind', 'group', 'x_group'), KINDS)
def test_many_rows(kind, group, x_group, device):
    codes, scales, weight = operands(100, 208, 384, kind, group, x_group, device)
    wanted = scaled_linear.reference(codes, scales, weight, '', torch.float32)
    out = torch.empty(100, 208, device=device)
    found = many_gemm(codes, scales, weight, ManyConfig(64, 128, 128, 4, 3, 2), out, pdl=not INTERPRETED)
    assert off(found, wanted) < (1e-6 if kind == 'int8' else 1e-3)

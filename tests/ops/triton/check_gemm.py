"""The product of few rows: every way of splitting it, its epilogues, and where it hands over to cuBLAS."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.ops.linear import interleave
from lmdeploy.ops.triton import gemm
from lmdeploy.ops.triton.gemm import GemmConfig, default, small_gemm
from tests.ops.triton.conftest import INTERPRETED

HALF = torch.float16 if INTERPRETED else torch.bfloat16
ERROR = 2e-3 if INTERPRETED else 8e-3  # of the norm; a rounding of the result is half a step
CONFIGS = [GemmConfig(32, 16, 1, 4, 2), GemmConfig(64, 32, 3, 4, 3, 64), GemmConfig(64, 64, 2, 4, 3, 128, tma=True)]


def operands(rows: int, n: int, k: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    shapes = (rows, k), (n, k), (n,)
    x, weight, bias = (torch.randn(shape, generator=generator) / (k**0.5 if shape == (n, k) else 1) for shape in shapes)
    return x.to(device, HALF), weight.to(device, HALF), bias.to(device, HALF)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize('config', CONFIGS, ids=str)
@pytest.mark.parametrize(('n', 'k'), [(64, 64), (96, 136), (208, 264)])
@pytest.mark.parametrize('rows', [1, 17])
def test_products(config, n, k, rows, device):
    x, weight, bias = operands(rows, n, k, device)
    wanted = F.linear(x.float(), weight.float())
    found = small_gemm(x, weight, None, config, pdl=not INTERPRETED)
    assert found.dtype is HALF and off(found, wanted) < ERROR
    exact = torch.empty(rows, n, device=device)
    small_gemm(x, weight, bias, config, pdl=not INTERPRETED, out=exact)
    assert off(exact, wanted + bias.float()) < 1e-5
    again = small_gemm(x, weight, bias, config, pdl=not INTERPRETED, out=torch.empty_like(exact))
    assert torch.equal(again, exact)  # whoever comes last


@pytest.mark.parametrize('config', CONFIGS, ids=str)
@pytest.mark.parametrize('name', ACTIVATIONS)
def test_gated_products(config, name, device):
    x, weight, bias = operands(3, 96, 72, device)
    gate, up = weight.chunk(2)
    rows, biases = interleave(gate, up), interleave(*bias.chunk(2))
    found = small_gemm(x, rows, biases, config, name, pdl=not INTERPRETED)
    wanted = ACTIVATIONS[name].reference(F.linear(x.float(), weight.float(), bias.float()))
    assert found.shape == (3, 48) and off(found, wanted) < ERROR


def test_rows_do_not_depend_on_their_number(device):
    x, weight, _ = operands(16, 64, 128, device)
    whole = small_gemm(x, weight, None, CONFIGS[1], pdl=not INTERPRETED)
    for a, b in ((0, 1), (3, 8), (15, 16)):
        assert torch.equal(small_gemm(x[a:b], weight, None, CONFIGS[1], pdl=not INTERPRETED), whole[a:b])


@pytest.mark.parametrize('columns', [16, 32, 64])
@pytest.mark.parametrize(('n', 'k'), [(896, 896), (4096, 14336), (128256, 4096), (8, 8)])
def test_the_default_fits_shared_memory_and_the_shape(n, k, columns):
    config = default(n, k, columns, 132)
    assert (config.block_n + columns) * config.block_k * 2 * config.stages <= 227 * 1024
    assert config.split == 1 or k >= 512
    assert config.block_n % 16 == 0


def test_the_measured_configurations_are_sound():
    for shape, config in gemm._tuned().items():
        n, k, columns = (int(part) for part in shape.replace('/', 'x').split('x'))
        assert columns in (16, 32, 64) and n > 0 and k % 8 == 0
        if config is not None:
            assert (config.block_n + columns) * config.block_k * 2 * config.stages <= 227 * 1024, shape


@pytest.mark.skipif(INTERPRETED, reason='asks for a GPU')
@pytest.mark.parametrize('rows', [1, 33, 64, 65, 300])
def test_the_ops_at_any_number_of_rows(rows, device):
    x, weight, bias = operands(rows, 1024, 512, device)
    wanted = F.linear(x.float(), weight.float(), bias.float())
    assert off(gemm.linear(x, weight, bias), wanted) < ERROR
    assert off(gemm.linear_float(x, weight, bias), wanted) < 1e-5
    gated = gemm.gated_linear(x, interleave(*weight.chunk(2)), interleave(*bias.chunk(2)), 'silu')
    assert off(gated, ACTIVATIONS['silu'].reference(wanted)) < ERROR

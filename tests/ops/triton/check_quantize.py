"""Quantising inputs, alone and behind norms and activations, against the references."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.ops import quantize as ops
from lmdeploy.ops.triton import quantize as kernels
from tests.ops.triton.conftest import INTERPRETED

HALF = torch.float16 if INTERPRETED else torch.bfloat16
KINDS = [('int8', 0), ('int8', 128), ('float8_e4m3fn', 0), ('float8_e4m3fn', 128), ('float8_e5m2', 0)]


def rows(count: int, size: int, device, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-2, 1, count)[:, None]
    return (torch.randn(count, size, generator=draw) * spread).to(device, HALF)


def exact(codes: torch.Tensor) -> bool:
    return codes.dtype is torch.int8 or not INTERPRETED


def agree(found, wanted):
    """Codes of one rounding: a last bit of a norm's sum, in another order, moves few codes by one step.

    The interpreter loses the carry where float8 is rounded up to a power of two, and gives half of it.
    """
    assert found[0].dtype is wanted[0].dtype and found[0].shape == wanted[0].shape
    assert torch.allclose(found[1], wanted[1], rtol=2e-3 if INTERPRETED else 1e-2)
    here, there = found[0].float(), wanted[0].float()
    largest = torch.maximum(here.abs(), there.abs())
    step = 1.0 if found[0].dtype is torch.int8 else largest / (2 if INTERPRETED else 4) + 2**-8
    assert ((here - there).abs() <= step).all()
    assert (here != there).float().mean() < 0.08


@pytest.mark.parametrize(('kind', 'group'), KINDS)
def test_alone(kind, group, device):
    x = rows(3, 200, device)
    x[1] = 0
    found, wanted = kernels.triton_quantize_tokens(x, kind, group), ops.quantize_tokens.reference(x, kind, group)
    agree(found, wanted)
    assert torch.equal(found[1], wanted[1])
    if exact(found[0]):
        assert torch.equal(found[0].float(), wanted[0].float())
    scale = torch.tensor(0.01, device=device)
    given = kernels.triton_quantize_static(x, kind, scale)
    if exact(given):
        assert torch.equal(given.float(), ops.quantize_static.reference(x, kind, scale).float())


@pytest.mark.parametrize(('kind', 'group'), KINDS)
def test_behind_a_norm(kind, group, device):
    x, residual, weight = rows(3, 320, device), rows(3, 320, device, 1), rows(1, 320, device, 2)[0]
    agree(kernels.triton_rms_norm_quantize(x, weight, 1e-6, kind, group),
          ops.rms_norm_quantize.reference(x, weight, 1e-6, kind, group))
    found = kernels.triton_add_rms_norm_quantize(x, residual, weight, 1e-6, kind, group)
    wanted = ops.add_rms_norm_quantize.reference(x, residual, weight, 1e-6, kind, group)
    agree(found[:2], wanted[:2])
    assert torch.equal(found[2], wanted[2])


@pytest.mark.parametrize('interleaved', [False, True])
@pytest.mark.parametrize('activation', ['silu', 'gelu_tanh'])
def test_behind_an_activation(activation, interleaved, device):
    x = rows(3, 2 * 136, device)
    for kind, group in KINDS[:4]:
        agree(kernels.triton_gate_mul_quantize(x, activation, interleaved, kind, group),
              ops.gate_mul_quantize.reference(x, activation, interleaved, kind, group))


def test_in_the_order_of_packed_weights(device):
    """All of them give the codes that they give otherwise."""
    x, residual, weight = rows(3, 160, device), rows(3, 160, device, 1), rows(1, 160, device, 2)[0]
    both = rows(3, 320, device)
    for run in (lambda turned: kernels.triton_quantize_tokens(x, 'int8', 0, turned),
                lambda turned: kernels.triton_rms_norm_quantize(x, weight, 1e-6, 'int8', 0, turned),
                lambda turned: kernels.triton_add_rms_norm_quantize(x, residual, weight, 1e-6, 'int8', 0, turned),
                lambda turned: kernels.triton_gate_mul_quantize(both, 'silu', True, 'int8', 0, turned)):
        plain, turned = run(False), run(True)
        assert torch.equal(ops.turn(plain[0]), turned[0]) and not torch.equal(plain[0], turned[0])
        assert torch.equal(plain[1], turned[1])

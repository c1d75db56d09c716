"""Norms, gated activations and the embedding against their references."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.ops.embedding import embed
from lmdeploy.ops.layer_norm import add_layer_norm
from lmdeploy.ops.linear import GATE_GROUP
from lmdeploy.ops.norm import add_rms_norm, norm_add_rms_norm, rms_norm
from lmdeploy.ops.triton.activation import gate_mul
from lmdeploy.ops.triton.embedding import triton_embed
from lmdeploy.ops.triton.layer_norm import triton_add_layer_norm
from lmdeploy.ops.triton.norm import triton_add_rms_norm, triton_norm_add_rms_norm, triton_rms_norm
from tests.tolerance import tolerance

SIZES = [16, 100, 896, 2304]


def noise(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1])).to(device, dtype)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('wide', [False, True])  # a float32 weight beside other activations
def test_norms(size, wide, dtype, device):
    x, residual = noise(3, size + 8, dtype=dtype, device=device)[:, :size], noise(3, size, dtype=dtype, device=device)
    weight, post = noise(2, size, dtype=torch.float32 if wide else dtype, device=device)
    limits = tolerance(dtype, 4.0)
    torch.testing.assert_close(triton_rms_norm(x, weight, 1e-5), rms_norm.reference(x, weight, 1e-5), **limits)
    for found, wanted in zip(triton_add_rms_norm(x, residual, weight, 1e-5),
                             add_rms_norm.reference(x, residual, weight, 1e-5), strict=True):
        assert found.dtype is dtype
        torch.testing.assert_close(found, wanted, **limits)
    found, total = triton_norm_add_rms_norm(x, residual, post, weight, 1e-5)
    same, sum_ = triton_add_rms_norm(triton_rms_norm(x, post, 1e-5), residual, weight, 1e-5)
    if dtype is torch.float32:  # a GPU multiplies and adds in one rounding
        torch.testing.assert_close(found, same, **limits)
        torch.testing.assert_close(total, sum_, **limits)
    else:  # fusing changes no bit: what is added was rounded before
        assert torch.equal(found, same) and torch.equal(total, sum_)
    torch.testing.assert_close(total, norm_add_rms_norm.reference(x, residual, post, weight, 1e-5)[1], **limits)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('scaled', [False, True])
def test_layer_norm_after_an_addition(size, scaled, dtype, device):
    x, residual = noise(3, size, dtype=dtype, device=device), noise(3, size, dtype=dtype, device=device) + 3
    scale, weight, bias = noise(3, size, dtype=dtype, device=device)
    given = x, residual, scale if scaled else None, weight, bias, 1e-6
    for found, wanted in zip(triton_add_layer_norm(*given), add_layer_norm.reference(*given), strict=True):
        assert found.dtype is dtype
        torch.testing.assert_close(found, wanted, **tolerance(dtype, 8.0))
    assert triton_add_layer_norm(x[:0], residual[:0], *given[2:])[1].shape == (0, size)


def test_norms_of_any_shape_and_of_no_rows(dtype, device):
    x, weight = noise(2, 3, 48, dtype=dtype, device=device), noise(48, dtype=dtype, device=device)
    wanted = rms_norm.reference(x, weight, 1e-5)
    torch.testing.assert_close(triton_rms_norm(x, weight, 1e-5), wanted, **tolerance(dtype, 4.0))
    assert triton_add_rms_norm(x[:0], x[:0], weight, 1e-5)[1].shape == (0, 3, 48)


@pytest.mark.parametrize('name', ACTIVATIONS)
@pytest.mark.parametrize('size', [8, 48, 1032])
def test_gated_activations(name, size, dtype, device):
    x = noise(3, 2 * size, dtype=dtype, device=device) * 4
    x[0, :4] = torch.tensor([-90.0, 90.0, 0.0, -30.0])
    wanted = ACTIVATIONS[name].reference(x.float()).to(dtype)
    found = gate_mul(x, name)
    torch.testing.assert_close(found, wanted, **tolerance(dtype, 8.0))
    halves = [half.unflatten(-1, (-1, GATE_GROUP)) for half in x.chunk(2, -1)]
    assert torch.equal(gate_mul(torch.stack(halves, -2).flatten(1), name, GATE_GROUP), found)
    assert torch.equal(gate_mul(x.view(3, 1, -1), name), found.view(3, 1, -1))
    assert gate_mul(x[:0], name).shape == (0, size)


@pytest.mark.parametrize('scale', [1.0, 1.5])
@pytest.mark.parametrize('size', [30, 2500])
def test_embedding(scale, size, dtype, device):
    table = noise(7, size, dtype=dtype, device=device)
    ids = torch.tensor([3, 0, 6, 3], dtype=torch.int32, device=device)
    assert torch.equal(triton_embed(ids, table, scale), embed.reference(ids, table, scale))
    assert triton_embed(ids[:0], table, scale).shape == (0, size)

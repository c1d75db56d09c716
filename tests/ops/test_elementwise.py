"""Norms, rope and activations: each implementation against its reference; rows do not know their neighbours."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.ops.embedding import embed
from lmdeploy.ops.norm import add_rms_norm, norm_add_rms_norm, rms_norm
from lmdeploy.ops.rope import rope
from tests.tolerance import tolerance

DTYPES = (torch.float32, torch.bfloat16)
ROWS = 130


def noise(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])).to(dtype)


def same_rows(run, x: torch.Tensor) -> bool:
    """Whether ``run`` gives each row the same bits in any group of rows."""
    whole = run(x)
    cuts = [(a, a + n) for n in (1, 2, 3, 5, 16, 31, 64) for a in (0, 1, 7, x.shape[0] - n)]
    return all(torch.equal(run(x[a:b]), whole[a:b]) for a, b in cuts)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', [16, 48, 100, 896, 4096])
@pytest.mark.parametrize('wide', [False, True])  # a float32 weight beside other activations
def test_rms_norm(dtype, size, wide):
    x, weight = noise(ROWS, size, dtype=dtype), noise(size, dtype=torch.float32 if wide else dtype)
    found = rms_norm(x, weight, 1e-5)
    assert found.dtype is dtype
    torch.testing.assert_close(found, rms_norm.reference(x, weight, 1e-5), **tolerance(dtype))
    assert same_rows(lambda rows: rms_norm(rows, weight, 1e-5), x)
    residual = noise(ROWS, size).to(dtype)
    for got, want in zip(add_rms_norm(x, residual, weight, 1e-5), add_rms_norm.reference(x, residual, weight, 1e-5)):
        torch.testing.assert_close(got, want, **tolerance(dtype))


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_norm_on_both_sides_of_the_addition_is_the_two_one_after_the_other(dtype):
    x, residual, post, weight = (noise(*shape, dtype=dtype) for shape in ((ROWS, 96), (ROWS, 96), (96,), (96,)))
    wanted = add_rms_norm(rms_norm(x, post, 1e-5), residual, weight, 1e-5)
    for got, want in zip(norm_add_rms_norm(x, residual, post, weight, 1e-5), wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize('dtype', DTYPES)
def test_embedding_gathers_and_scales(dtype):
    table, ids = noise(9, 24, dtype=dtype), torch.tensor([4, 0, 8, 4], dtype=torch.int32)
    assert torch.equal(embed(ids, table, 1.0), table[ids.long()])
    scale = torch.tensor(24**0.5, dtype=dtype).item()
    assert torch.equal(embed(ids, table, scale), table[ids.long()] * scale)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', ACTIVATIONS)
@pytest.mark.parametrize('size', [1, 17, 80, 4864])
def test_gated_activations(dtype, name, size):
    activation, x = ACTIVATIONS[name], noise(ROWS, 2 * size, dtype=dtype) * 4
    found = activation(x)
    torch.testing.assert_close(found, activation.reference(x), **tolerance(dtype, float(x.abs().max())))
    assert same_rows(activation, x)
    assert torch.equal(activation(x.view(13, 10, -1)), found.view(13, 10, -1))


def test_activations_of_extreme_inputs():
    gate = torch.tensor([-200.0, -90.0, 90.0, 200.0, 0.0])
    x = torch.cat((gate, torch.ones(5)))[None]
    for name, activation in ACTIVATIONS.items():
        assert activation(x).isfinite().all(), name
        torch.testing.assert_close(activation(x), activation.reference(x), atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize(('dim', 'rotated'), [(64, 64), (16, 16), (80, 32)])
def test_rope_turns_pairs(dim, rotated):
    x, angle = noise(9, 3, dim), noise(9, 1, rotated // 2) * 30
    cos, sin = torch.cat((angle.cos(),) * 2, -1), torch.cat((-angle.sin(), angle.sin()), -1)
    found = rope(x, cos, sin)
    half = rotated // 2
    turned = torch.complex(x[..., :half], x[..., half:rotated]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(found[..., :rotated], torch.cat((turned.real, turned.imag), -1), atol=1e-5, rtol=1e-5)
    assert torch.equal(found[..., rotated:], x[..., rotated:])
    assert torch.equal(rope(x[4:5], cos[4:5], sin[4:5])[0], found[4])
    assert rope(x.bfloat16(), cos, sin).dtype is torch.float32

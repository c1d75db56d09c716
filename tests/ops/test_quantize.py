"""Quantising inputs: codes and scales of every token by their definition."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.ops.quantize import LARGEST, TYPES, quantize_static, quantize_tokens


@pytest.mark.parametrize('kind', LARGEST)
@pytest.mark.parametrize(('channels', 'group'), [(64, 0), (64, 16), (50, 16), (50, 64)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_tokens_by_definition(kind: str, channels: int, group: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5, channels, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    codes, scales = quantize_tokens(x, kind, group)
    size = group or channels
    assert codes.dtype == TYPES[kind] and scales.dtype == torch.float32
    assert codes.shape == x.shape and scales.shape == (5, -(-channels // size))
    for token in range(5):
        for g in range(scales.shape[1]):
            part = x[token, g * size : (g + 1) * size].float()
            scale = part.abs().max() / LARGEST[kind]
            assert scales[token, g] == scale
            wanted = (part / scale).round() if kind == 'int8' else (part / scale).to(TYPES[kind]).float()
            assert torch.equal(codes[token, g * size : (g + 1) * size].float(), wanted)


@pytest.mark.parametrize('kind', LARGEST)
def test_nothing_is_lost_of_nothing(kind: str) -> None:
    codes, scales = quantize_tokens(torch.zeros(2, 8), kind, 0)
    assert (codes.float() == 0).all() and (scales > 0).all()


@pytest.mark.parametrize('kind', LARGEST)
def test_rows_do_not_depend_on_each_other(kind: str) -> None:
    x = torch.randn(7, 40)
    codes, scales = quantize_tokens(x, kind, 16)
    for i in range(7):
        alone = quantize_tokens(x[i : i + 1], kind, 16)
        assert torch.equal(alone[0].float(), codes[i : i + 1].float()) and torch.equal(alone[1], scales[i : i + 1])


@pytest.mark.parametrize('kind', LARGEST)
def test_a_given_scale_cuts_what_is_too_large(kind: str) -> None:
    limit, scale = LARGEST[kind], torch.tensor(0.5)
    x = torch.tensor([[0.0, 1.0, -1.0, limit, -10 * limit]])
    codes = quantize_static(x, kind, scale)
    assert codes.dtype == TYPES[kind] and codes.float().tolist() == [[0.0, 2.0, -2.0, limit, -limit]]

"""GPTQ's inner loop against its reference."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.ops.round_columns import round_columns
from lmdeploy.ops.triton.round_columns import triton_round_columns


@pytest.mark.parametrize(('count', 'outputs'), [(16, 40), (7, 5)])
@pytest.mark.parametrize('asymmetric', [False, True])
@pytest.mark.parametrize('holding', [False, True])
def test_the_reference(count, outputs, asymmetric, holding, device):
    random = torch.Generator().manual_seed(count)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    targets, mixing = draw(count, outputs), draw(count + 3, count + 3)[:count, :count] * 0.2
    scales = draw(count, outputs).abs() * 0.1 + 0.05
    scales[0] *= -1
    zeros = torch.randint(0, 16, (count, outputs), generator=random).float() if asymmetric else None
    held = draw(count, outputs) if holding else None
    low, high = (0, 15) if asymmetric else (-8, 7)
    wanted = round_columns.reference(targets.clone(), mixing, scales, zeros, low, high, held)
    args = [None if t is None else t.to(device) for t in (targets, mixing, scales, zeros)]
    found = triton_round_columns(*args, low, high, None if held is None else held.to(device))
    assert torch.equal(found[0].cpu(), wanted[0])
    torch.testing.assert_close(found[1].cpu(), wanted[1], atol=1e-5, rtol=1e-5)


def test_blocks_have_an_end(device):
    x = torch.ones(129, 4, device=device)
    with pytest.raises(ValueError, match='at most 128'):
        triton_round_columns(x, torch.ones(129, 129, device=device), x, None, -8, 7, None)

"""The two ends of a recorded step against their references."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.ops.slots import decode_inputs, keep_results
from lmdeploy.ops.triton.step import triton_decode_inputs, triton_keep_results

SLOTS, WIDTH, SIZE = 200, 9, 64


@pytest.mark.parametrize('rows', [1, 3, 130])
def test_inputs(rows, device):
    generator = torch.Generator().manual_seed(rows)
    slots = torch.randperm(SLOTS, generator=generator)[:rows]
    positions = torch.randint(0, WIDTH * SIZE, (rows,), generator=generator)
    tokens = torch.randint(-1, 3, (rows,), generator=generator)
    new = torch.randint(-50, 50, (rows,), generator=generator).clamp(min=0)
    packed = torch.stack((slots, positions, tokens, new)).int().to(device)
    blocks = torch.randint(1, 1000, (SLOTS + 1, WIDTH), generator=generator, dtype=torch.int32).to(device)
    last = torch.randint(0, 99, (SLOTS + 1,), generator=generator, dtype=torch.int32).to(device)
    wanted_blocks = blocks.clone()
    wanted = decode_inputs.reference(packed, wanted_blocks, last, SIZE)
    found = triton_decode_inputs(packed, blocks, last, SIZE)
    assert torch.equal(blocks, wanted_blocks)
    for a, b in zip(found, wanted):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize('rows', [1, 5, 140])
def test_results(rows, device):
    tokens = torch.arange(rows, dtype=torch.int32, device=device) + 7
    status = (torch.arange(rows, device=device) % 3).to(torch.uint8)
    turn = torch.tensor([0, 2], dtype=torch.int32, device=device)[1:]
    found, wanted = (torch.full((4, 300), -1, dtype=torch.int32, device=device) for _ in range(2))
    triton_keep_results(found, turn, tokens, status)
    keep_results.reference(wanted, turn, tokens, status)
    assert torch.equal(found, wanted) and (wanted[2] >= 0).sum() == 2 * rows

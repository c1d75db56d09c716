"""Tables, norm, rotation and cache write against their references."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.ops.rope import rope_tables, rope_write_kv
from lmdeploy.ops.triton.rope import triton_rope_tables, triton_rope_write_kv


@pytest.mark.parametrize('factor', [1.0, 1.25])
@pytest.mark.parametrize('half', [32, 20])
def test_tables(half, factor, device):
    positions = torch.tensor([0, 1, 77, 8191, 131071], dtype=torch.int32, device=device)
    frequencies = (1 / 10000 ** (torch.arange(half) / half)).to(device)
    for found, wanted in zip(triton_rope_tables(positions, frequencies, factor),
                             rope_tables.reference(positions, frequencies, factor)):
        assert found.shape == (5, 1, 2 * half)
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize(('heads', 'kv_heads', 'dim', 'rotated', 'block'), [
    (6, 2, 64, 64, 64), (14, 2, 32, 32, 128), (4, 4, 80, 80, 64), (3, 1, 64, 32, 64)])
def test_write(heads, kv_heads, dim, rotated, block, norm, dtype, device):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    tokens, blocks = 5, 4
    qkv = random(tokens, heads + 2 * kv_heads, dim)
    qkv[1, heads, 3], qkv[2, -1, 5] = float('nan'), float('inf')
    qkv = qkv.to(dtype).to(device)
    positions = torch.randint(0, 1000, (tokens,), generator=generator, dtype=torch.int32)
    cos, sin = rope_tables.reference(positions, 1 / 10000 ** (torch.arange(rotated // 2) / rotated * 2), 1.0)
    weights = [(random(dim) / 4 + 1).to(device) for _ in 'qk'] if norm else [None, None]
    slots = torch.randperm(blocks * block, generator=generator)[:tokens].to(device)
    planes = [torch.zeros(blocks, kv_heads, block, dim, dtype=dtype, device=device) for _ in range(4)]
    found = triton_rope_write_kv(qkv, cos.to(device), sin.to(device), *weights, 1e-6, *planes[:2], slots)
    wanted = rope_write_kv.reference(qkv, cos.to(device), sin.to(device), *weights, 1e-6, *planes[2:], slots)
    error = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, wanted, atol=error, rtol=error)
    for ours, theirs in zip(planes[:2], planes[2:]):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, atol=error, rtol=error)

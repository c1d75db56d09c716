"""Norm, rotation, quantisation and cache write against the reference."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kv.cache import KVCache, KVShape
from lmdeploy.ops.kv_codes import KeyBasis, dequantise, rope_write_codes
from lmdeploy.ops.rope import rope_tables
from lmdeploy.ops.triton.kv_codes import triton_rope_write_codes


@pytest.mark.parametrize(('bits', 'turned'), [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize(('norm', 'offset'), [(False, True), (True, False)])
@pytest.mark.parametrize(('heads', 'kv_heads', 'dim', 'rotated', 'block'), [
    (6, 2, 64, 32, 128), (4, 4, 80, 80, 64)])
def test_write(heads, kv_heads, dim, rotated, block, norm, offset, bits, turned, dtype, device):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    tokens, blocks = 19, 4
    qkv = random(tokens, heads + 2 * kv_heads, dim)
    values = 30 * random(kv_heads, dim) if offset else None
    if values is not None:
        qkv[:, heads : heads + kv_heads] += values
        values = values.to(device)
    qkv[1, heads, 3], qkv[2, -1, 5], qkv[3, -1] = float('nan'), float('inf'), 2.5
    qkv = qkv.to(dtype).to(device)
    positions = torch.randint(0, 1000, (tokens,), generator=generator, dtype=torch.int32)
    tables = rope_tables.reference(positions, 1 / 10000 ** (torch.arange(rotated // 2) / rotated * 2), 1.0)
    cos, sin = (table.to(device) for table in tables)
    weights = [(random(dim) / 4 + 1).to(device) for _ in 'qk'] if norm else [None, None]
    slots = torch.randperm(blocks * block, generator=generator)[:tokens].to(device)
    layers = [KVCache(KVShape(1, kv_heads, dim, bits), blocks - 1, block, dtype, device).layer(0) for _ in range(2)]
    basis = KeyBasis.of(random(99, heads, dim).to(device), random(99, kv_heads, dim).to(device)) if turned else None
    found = triton_rope_write_codes(qkv, cos, sin, *weights, 1e-6, values, basis, layers[0], slots)
    wanted = rope_write_codes.reference(qkv, cos, sin, *weights, 1e-6, values, basis, layers[1], slots)
    error = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for ours, theirs in zip(found, wanted):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=error, rtol=error)
    for plane in 'k_scales', 'v_scales':  # a number next to the middle of two may be rounded to either
        torch.testing.assert_close(getattr(layers[0], plane), getattr(layers[1], plane), atol=1e-3, rtol=2e-3)
    for plane, scales in zip('kv', layers[1].scales):
        ours, theirs = (dequantise(getattr(layer, plane), getattr(layer, f'{plane}_scales'), dim) for layer in layers)
        apart = (ours - theirs).abs()
        step = scales[..., :1].float()
        assert (apart <= 1.01 * step + 0.01).all()
        assert (apart > 0.1 * step + 0.01).sum() <= 0.01 * tokens * kv_heads * dim + 3

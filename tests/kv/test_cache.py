"""KVCache: sizes, views, and the null block."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kv.cache import KVCache, KVShape
from lmdeploy.kv.format import Fp

SHAPE = KVShape(num_layers=3, kv_heads=2, head_dim=16)


def test_bytes_per_block():
    assert SHAPE.bytes_per_block(64, Fp(torch.bfloat16)) == 3 * 2 * 2 * 64 * 16 * 2
    assert KVCache(SHAPE, 7, 64, torch.float32).nbytes == 8 * SHAPE.bytes_per_block(64, Fp(torch.float32))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_layers_are_disjoint_views_of_one_pool_of_zeros(dtype):
    kv = KVCache(SHAPE, 4, 128, dtype)
    planes = [plane for i in range(3) for plane in (kv.layer(i).k, kv.layer(i).v)]
    for number, plane in enumerate(planes, 1):
        assert plane.shape == (5, 2, 128, 16) and plane.dtype is dtype and plane.is_contiguous() and not plane.any()
        plane.fill_(number)
    assert all((plane == number).all() for number, plane in enumerate(planes, 1))
    assert kv.pool.view(dtype).unique().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize('size', [0, 63, 100, -64])
def test_block_sizes_are_whole_pages(size):
    with pytest.raises(ValueError, match='multiple of 64'):
        KVCache(SHAPE, 1, size)


def test_formats_name_themselves():
    assert Fp(torch.bfloat16).name == 'bfloat16'

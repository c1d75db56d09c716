"""Attention backends: the choice with its reasons, and the CPU backend against the reference over a growing cache."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.attention.backend import AttentionCase, Rotation, choose, explain
from lmdeploy.attention.cpu import CPUSpans
from lmdeploy.attention.reference import Reference
from lmdeploy.attention.triton_paged import TritonPaged
from lmdeploy.kv.cache import KVCache, KVShape
from lmdeploy.ops.rope import rope_tables
from lmdeploy.runner.batch import ForwardBatch

CPU = torch.device('cpu')
CASE = AttentionCase(heads=6, kv_heads=2, head_dim=32, windows=(0, 40))


def test_choice():
    assert choose(CPU, torch.bfloat16, CASE).name == 'cpu_spans'
    assert choose(torch.device('meta'), torch.float32, CASE).name == 'reference'
    assert explain(torch.device('meta'), torch.float32, CASE).splitlines() == [
        'attention: cpu_spans: runs on cpu, not on meta', 'attention: triton_paged: runs on cuda, not on meta',
        'attention: reference: chosen']  # fmt: skip


def test_what_the_gpu_backend_does_not_do():
    reasons = TritonPaged().refuse(AttentionCase(heads=64, kv_heads=1, head_dim=512), CPU, torch.float64)
    assert {'runs on cuda, not on cpu', 'no torch.float64', 'heads of 512 channels are larger than 256',
            'more than 32 query heads to a key head'} <= set(reasons)  # fmt: skip


def batch_of(done: list[int], feed: list[int], blocks: list[list[int]], block_size: int) -> ForwardBatch:
    """Row i writes ``feed[i]`` tokens after ``done[i]`` cached ones."""
    positions = [done[i] + j for i in range(len(feed)) for j in range(feed[i])]
    rows = [i for i in range(len(feed)) for _ in range(feed[i])]
    slots = [blocks[i][p // block_size] * block_size + p % block_size for i, p in zip(rows, positions)]
    start = [sum(feed[:i]) for i in range(len(feed) + 1)]
    lens = [d + f for d, f in zip(done, feed)]
    return ForwardBatch(
        torch.zeros(len(rows), dtype=torch.int32), torch.tensor(positions, dtype=torch.int32), torch.tensor(slots),
        torch.tensor(start, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32),
        torch.tensor(blocks, dtype=torch.int32), torch.tensor(start[1:]) - 1, max(feed), max(lens), start, lens,
    )  # fmt: skip


@pytest.mark.parametrize(('dtype', 'error'), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('block_size', [64, 192])
def test_cpu_spans_equal_the_reference(dtype, error, block_size):
    generator = torch.Generator().manual_seed(0)
    ours, reference = CPUSpans(), Reference()
    caches = [KVCache(KVShape(1, 2, 32), 40, block_size, dtype) for _ in range(2)]
    blocks = [list(range(first, first + 10)) for first in (31, 1, 11)]
    done = [0, 0, 0]
    for feed in ([3, 150, 1], [1, 1, 1], [100, 200, 1], [1, 64, 20], [1, 1, 1]):
        batch = batch_of(done, feed, blocks, block_size)
        batch.plan = ours.prepare(CASE, batch, caches[0])
        count = sum(feed)
        qkv = torch.randn(count, 10, 32, generator=generator).to(dtype)
        rotation = Rotation(*rope_tables(batch.positions, torch.rand(16, generator=generator), 1.0))
        for window in CASE.windows:
            found, wanted = (
                backend.run(qkv, rotation, kv.layer(0), batch, 32**-0.5, window)
                for backend, kv in zip((ours, reference), caches)
            )
            assert found.dtype is dtype
            torch.testing.assert_close(found, wanted, atol=error, rtol=error)
        assert torch.equal(caches[0].pool, caches[1].pool)
        done = [d + f for d, f in zip(done, feed)]

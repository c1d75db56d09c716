"""Cache writes and paged attention: the CPU implementations against their references, and the facts they rest on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmdeploy.ops.cpu import spans
from lmdeploy.ops.paged_attention import paged_attention
from lmdeploy.ops.write_kv import write_kv


def cache(blocks: int, kv_heads: int, block_size: int, dim: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(blocks, kv_heads, block_size, dim, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('block_size', [64, 128])
def test_write_kv(dtype, block_size):
    k, v = torch.randn(7, 3, 32), torch.randn(7, 3, 32)
    k[2, 1, 5], v[3, 0, 0], v[4, 2, 1] = torch.nan, torch.inf, -torch.inf
    slots = torch.tensor([0, 70, 63, 64, 5 * block_size - 1, 0, 190])
    planes, wanted = cache(5, 3, block_size, 32, dtype), cache(5, 3, block_size, 32, dtype)
    write_kv(k, v, *planes, slots)
    write_kv.reference(k, v, *wanted, slots)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(planes, wanted))
    assert torch.equal(planes[0][70 // block_size, :, 70 % block_size], k[1].to(dtype))
    assert planes[1][64 // block_size, 0, 64 % block_size, 0] == 0


CASES = [  # heads, kv_heads, dim, block_size, window
    (8, 8, 64, 64, 0), (8, 4, 80, 64, 0), (6, 2, 96, 128, 0), (8, 2, 128, 64, 100), (5, 1, 256, 64, 0),
    (14, 2, 64, 320, 300), (8, 1, 16, 64, 5), (7, 1, 64, 64, 1),
]  # fmt: skip
STEPS = {  # (queries, cached tokens after them) of each row
    'decode': [(1, 1), (1, 64), (1, 65), (1, 300), (1, 255), (1, 256), (1, 257)],
    'prefill': [(1, 1), (16, 16), (17, 17), (64, 64), (65, 65), (200, 200), (300, 300)],
    'mixed': [(1, 700), (30, 290), (2, 513), (100, 600), (1, 3)],
    'long': [(1, 2400), (70, 2110), (1, 40)],
}


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('step', STEPS)
def test_span_attention_equals_the_reference(case, step):
    heads, kv_heads, dim, block_size, window = case
    lens = [kv_len for _, kv_len in STEPS[step]]
    start = np.cumsum([0, *(n for n, _ in STEPS[step])]).tolist()
    counts = [-(-kv_len // block_size) for kv_len in lens]
    blocks = sum(counts) + 1
    order = iter((torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(1)) + 1).tolist())
    table = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count] = torch.tensor([next(order) for _ in range(count)])
    planes = cache(blocks, kv_heads, block_size, dim)
    q = torch.randn(start[-1] + 2, heads, dim, generator=torch.Generator().manual_seed(2))  # two padding tokens
    arguments = (q, *planes, table, start, lens, dim**-0.5, window)
    found = paged_attention(*arguments)
    torch.testing.assert_close(found, paged_attention.reference(*arguments), atol=2e-5, rtol=2e-5)
    assert (found[-2:] == 0).all()


def test_scores_of_any_size_give_finite_results():
    planes = cache(9, 1, 64, 16)
    table = torch.arange(1, 9, dtype=torch.int32)[None]
    q = torch.randn(3, 2, 16)
    for size in (0.0, 1e-30, 1e4):
        arguments = (q * size, *planes, table, [0, 3], [500], 1.0, 0)
        found, wanted = paged_attention(*arguments), paged_attention.reference(*arguments)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('dim', [16, 64, 80, 128, 256])
@pytest.mark.parametrize('batch', [1, 2, 3, 8])
def test_batched_products_keep_their_bits(dim, batch):
    """What span attention rests on: any multiple of row_step rows, any of WIDTHS with zeros behind."""
    step = spans.row_step(dim)
    k, q = torch.randn(batch, spans.SPAN, dim), torch.randn(batch, 448, dim)
    scores, weights = torch.bmm(q, k.transpose(1, 2)), torch.rand(batch, 448, spans.SPAN)
    results = torch.bmm(weights, k)
    for rows in (step, 2 * step, 5 * step, 64, 192):
        assert torch.equal(torch.bmm(weights[:, :rows].contiguous(), k), results[:, :rows])
        for width in spans.WIDTHS:
            some = torch.bmm(q[:, :rows].contiguous(), k[:, :width].contiguous().transpose(1, 2))
            assert torch.equal(some, scores[:, :rows, :width])
            cut = weights[:, :rows].clone()
            cut[..., width:] = 0
            narrow = torch.bmm(cut[..., :width].contiguous(), k[:, :width].contiguous())
            assert torch.equal(narrow, torch.bmm(cut, k))


def test_softmax_keeps_its_bits_when_hidden_keys_follow():
    scores = torch.randn(40, spans.SPAN) * 5
    for seen in (1, 17, 63, 64, 100, 128):
        hidden = scores.clone()
        hidden[:, seen:] = float(spans.NEVER)
        whole = hidden.softmax(-1)
        for width in spans.WIDTHS:
            if width >= seen:
                assert torch.equal(hidden[:, :width].contiguous().softmax(-1), whole[:, :width])
        assert (whole[:, seen:] == 0).all()

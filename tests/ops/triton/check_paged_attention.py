"""Decode and prefill kernels against the reference, over shuffled block tables."""

from __future__ import annotations

import os

import pytest
import torch

from lmdeploy.ops.paged_attention import paged_attention
from lmdeploy.ops.triton.paged_attention_decode import DecodeConfig, decode_attention, make_workspace, plan_decode
from lmdeploy.ops.triton.paged_attention_prefill import PrefillConfig, prefill_attention

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'

SMALL = [(8, 2, 16, 64), (6, 2, 24, 128), (14, 2, 16, 64)]
SHAPES = SMALL if INTERPRETED else [(8, 2, 64, 64), (6, 2, 80, 64), (16, 1, 128, 128), (4, 4, 256, 64), (14, 2, 96, 64)]
ERRORS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Case:
    """Rows of (queries, cached tokens), their cache, and a block table whose rows are in another order."""

    def __init__(self, rows, heads, kv_heads, dim, block, dtype, device):
        generator = torch.Generator().manual_seed(0)
        self.queries, self.lens = [n for n, _ in rows], [length for _, length in rows]
        self.start = [sum(self.queries[:i]) for i in range(len(rows) + 1)]
        counts = [-(-length // block) for length in self.lens]
        blocks = iter((torch.randperm(sum(counts), generator=generator) + 1).tolist())
        table = torch.zeros(len(rows), max(counts) + 1, dtype=torch.int32)
        for row, count in enumerate(counts):
            table[row, :count] = torch.tensor([next(blocks) for _ in range(count)])
        self.rows = torch.randperm(len(rows), generator=generator).int()
        shuffled = torch.empty_like(table)
        shuffled[self.rows.long()] = table
        shape = sum(counts) + 1, kv_heads, block, dim
        self.k, self.v = (torch.randn(shape, generator=generator).to(dtype).to(device) for _ in 'kv')
        self.q = torch.randn(self.start[-1] + 2, heads, dim, generator=generator).to(dtype).to(device)
        self.table, self.shuffled, self.rows = table.to(device), shuffled.to(device), self.rows.to(device)
        self.device_lens, self.device_start = (
            torch.tensor(values, dtype=torch.int32, device=device) for values in (self.lens, self.start))
        self.out = torch.full_like(self.q, float('nan'))
        self.scale = dim**-0.5

    def check(self, window, first=0):
        """Rows from ``first`` on are right, and nothing else was written."""
        wanted = paged_attention.reference(self.q.float(), self.k.float(), self.v.float(), self.table, self.start,
                                           self.lens, self.scale, window)
        begin, end = self.start[first], self.start[-1]
        error = ERRORS[self.q.dtype]
        torch.testing.assert_close(self.out[begin:end].float(), wanted[begin:end], atol=error, rtol=error)
        assert self.out[:begin].isnan().all() and self.out[end:].isnan().all()


@pytest.mark.parametrize('window', [0, 100])
@pytest.mark.parametrize('way', [{}, {'swap': True}, {'tma': False}, {'fused': False}], ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_decode(shape, way, window, dtype, device):
    heads, kv_heads, dim, block = shape
    case = Case([(1, length) for length in (300, 1, 64, 65)], *shape, dtype, device)
    for programs in (1, 5, 20):
        plan = plan_decode(case.device_lens, kv_heads, window, programs)
        workspace = make_workspace(programs, heads // kv_heads, dim, device)
        for _ in range(2):  # the second time: what the first left behind in the workspace does no harm
            case.out.fill_(float('nan'))
            decode_attention(case.q, case.k, case.v, case.shuffled, case.rows, case.device_start, case.device_lens,
                             plan, workspace, case.out, case.scale, window, DecodeConfig(1, 4, 3, **way))
            case.check(window)
        assert not workspace.counts.any()


def test_rows_without_tokens_are_left_alone(device):
    case = Case([(1, 70), (1, 3), (1, 130)], 4, 2, 64, 64, torch.float32, device)
    lens = torch.tensor([70, 0, 130], dtype=torch.int32, device=device)
    plan = plan_decode(lens, 2, 0, 5)
    decode_attention(case.q, case.k, case.v, case.shuffled, case.rows, case.device_start, lens, plan,
                     make_workspace(5, 2, 64, device), case.out, case.scale, 0)
    assert case.out[1].isnan().all()
    case.out[1] = paged_attention.reference(case.q, case.k, case.v, case.table, case.start, case.lens, case.scale, 0)[1]
    case.check(0)


@pytest.mark.parametrize('window', [0, 50])
@pytest.mark.parametrize('config', [PrefillConfig(16, 1, 4, 3), PrefillConfig(64, 1, 4, 2),
                                    PrefillConfig(32, 1, 4, 3, tma=False)], ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_prefill(shape, config, window, dtype, device):
    rows = [(1, 5), (70, 70), (1, 130), (30, 150)]
    case = Case(rows, *shape, dtype, device)
    prefill_attention(case.q, case.k, case.v, case.shuffled, case.rows, case.device_start, case.device_lens, 1,
                      len(rows) - 1, case.start[-1] - 1, case.out, case.scale, window, config)
    case.check(window, first=1)

"""Decode and prefill kernels against the reference, over shuffled block tables."""

from __future__ import annotations

import os

import pytest
import torch

from lmdeploy.kv.cache import KVLayer
from lmdeploy.ops.paged_attention import paged_attention
from lmdeploy.ops.triton.paged_attention_decode import DecodeConfig, decode_attention, make_workspace, plan_decode
from lmdeploy.ops.triton.paged_attention_decode import config_of as decode_config
from lmdeploy.ops.triton.paged_attention_prefill import PrefillConfig, plan_prefill, prefill_attention
from lmdeploy.ops.triton.paged_attention_prefill import config_of as prefill_config

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'

SMALL = [(8, 2, 16, 64), (6, 2, 24, 128), (14, 2, 8, 64)]
SHAPES = SMALL if INTERPRETED else [(8, 2, 64, 64), (6, 2, 80, 128), (14, 2, 128, 64)]  # heads, kv_heads, D, block size
ERRORS = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


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


DECODE = [  # shape, launch parameters, window, programs
    (0, DecodeConfig(1, 5, True), 0, 5), (0, DecodeConfig(1, 3, True, least=2), 100, 9),
    (2, DecodeConfig(1, 5, True, tma=False), 70, 7), (1, DecodeConfig(1, 5, True), 0, 3),
    (0, DecodeConfig(1, 5, False), 0, 9), (2, DecodeConfig(1, 3, False, least=3), 90, 1),
    (1, DecodeConfig(1, 5, False, tma=False), 100, 5),
]  # fmt: skip


def decode(case, kv_heads, window, programs, config, lens=None):
    """Twice: what the first left behind in the workspace does no harm."""
    lens = case.device_lens if lens is None else lens
    plan = plan_decode(lens, case.device_start, case.rows, kv_heads, window, programs, config)
    workspace = make_workspace(programs, case.q.shape[1] // kv_heads, case.q.shape[2], lens.device)
    for _ in range(2):
        case.out.fill_(float('nan'))
        decode_attention(case.q, KVLayer(case.k, case.v), case.shuffled, case.rows, case.device_start, lens, plan,
                         workspace, case.out, case.scale, window)  # fmt: skip
    assert not workspace.counts.any()


@pytest.mark.parametrize(('shape', 'config', 'window', 'programs'), DECODE, ids=str)
def test_decode(shape, config, window, programs, dtype, device):
    case = Case([(1, length) for length in (200, 1, 64, 65)], *SHAPES[shape], dtype, device)
    decode(case, SHAPES[shape][1], window, programs, config)
    case.check(window)


@pytest.mark.parametrize('fused', [True, False])
def test_rows_without_tokens_are_left_alone(fused, device):
    case = Case([(1, 70), (1, 3), (1, 130)], 4, 2, 16, 64, torch.float32, device)
    decode(case, 2, 0, 5, DecodeConfig(1, 3, fused), torch.tensor([70, 0, 130], dtype=torch.int32, device=device))
    assert case.out[1].isnan().all()
    case.out[1] = paged_attention.reference(case.q, case.k, case.v, case.table, case.start, case.lens, case.scale, 0)[1]
    case.check(0)


def test_decode_of_many_parts(device):
    """A long row beside a short one, more parts than are merged at once."""
    for fused in (True, False):
        case = Case([(1, 40 * 64 + 1), (1, 3)], 2, 1, 16, 64, torch.float32, device)
        decode(case, 1, 0, 40, DecodeConfig(1, 3, fused))
        case.check(0)


def prefill(case, first, kv_heads, window, config):
    """The rows from ``first`` on; the bound of tokens is a loose one."""
    plan = plan_prefill(case.device_start, case.device_lens, case.rows, first, len(case.lens) - first, case.q.shape[0],
                        case.q.shape[1] // kv_heads, config)
    prefill_attention(case.q, KVLayer(case.k, case.v), case.shuffled, plan, case.out, case.scale, window)


PREFILL = [  # shape, launch parameters, window
    (2, PrefillConfig(64, 4, 3), 0), (1, PrefillConfig(16, 4, 3), 50), (0, PrefillConfig(32, 4, 2), 0),
    (0, PrefillConfig(32, 4, 3, tma=False), 70), (1, PrefillConfig(64, 4, 3, tma=False), 1),
]  # fmt: skip


@pytest.mark.parametrize(('shape', 'config', 'window'), PREFILL, ids=str)
def test_prefill(shape, config, window, dtype, device):
    rows = [(1, 5), (70, 70), (1, 130), (30, 150)]
    case = Case(rows, *SHAPES[shape], dtype, device)
    prefill(case, 1, SHAPES[shape][1], window, config)
    case.check(window, first=1)


@pytest.mark.parametrize(('group', 'dim', 'pairs'), [(16, 128, 6), (7, 64, 128), (1, 256, 6), (4, 96, 512)])
def test_launch_parameters_that_are_chosen(group, dim, pairs, dtype, device):
    """Decode and prefill as models run them, at real head sizes."""
    if INTERPRETED:
        dim //= 8
    case = Case([(1, 200), (1, 64), (1, 1), (40, 150)], group * 2, 2, dim, 64, dtype, device)
    decode(case, 2, 0, 9, decode_config(dim, case.q.element_size(), pairs), case.device_lens[:3])
    prefill(case, 3, 2, 0, prefill_config(dim, case.q.element_size()))
    case.check(0)

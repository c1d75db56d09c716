"""The two ends of a recorded decode step: from what the host sends to the model's inputs, and from tokens to results.

Bound: launches. Each is one small kernel instead of a dozen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.ops.slots import decode_inputs, keep_results
from lmdeploy.ops.triton.launch import cdiv, gdc_launch_dependents, gdc_wait, supports_pdl

_BLOCK = 128


@triton.jit(do_not_specialize=['rows'])
def _decode_inputs_kernel(packed, blocks, last_token, token_ids, positions, kv_slots, kv_lens, rows,
                          WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < rows
    slot = tl.load(packed + at, mask=there, other=0).to(tl.int64)
    position = tl.load(packed + rows + at, mask=there, other=0)
    token = tl.load(packed + 2 * rows + at, mask=there, other=0)
    new = tl.load(packed + 3 * rows + at, mask=there, other=0)
    entry = blocks + slot * WIDTH + position // SIZE
    block = tl.load(entry, mask=there, other=0)
    tl.store(entry, new, mask=there & (new > 0))
    block = tl.where(new > 0, new, block)
    last = tl.load(last_token + slot, mask=there, other=0)
    tl.store(token_ids + at, tl.where(token < 0, last, token), mask=there)
    tl.store(positions + at, position, mask=there)
    tl.store(kv_slots + at, block.to(tl.int64) * SIZE + position % SIZE, mask=there)
    tl.store(kv_lens + at, position + 1, mask=there)


@decode_inputs.impl('cuda')
def triton_decode_inputs(packed: Tensor, blocks: Tensor, last_token: Tensor, block_size: int
                         ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = packed.shape[1]
    token_ids, positions, kv_lens = (torch.empty(rows, dtype=torch.int32, device=packed.device) for _ in range(3))
    kv_slots = torch.empty(rows, dtype=torch.int64, device=packed.device)
    pdl = supports_pdl(packed.device)
    _decode_inputs_kernel[(cdiv(rows, _BLOCK),)](
        packed, blocks, last_token, token_ids, positions, kv_slots, kv_lens, rows, WIDTH=blocks.shape[1],
        SIZE=block_size, BLOCK=_BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return token_ids, positions, kv_slots, kv_lens


@triton.jit(do_not_specialize=['rows', 'stride'], do_not_specialize_on_alignment=['turn'])
def _keep_results_kernel(results, turn, tokens, status, rows, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < rows
    out = results + tl.load(turn).to(tl.int64) * stride
    tl.store(out + at, tl.load(tokens + at, mask=there, other=0), mask=there)
    tl.store(out + rows + at, tl.load(status + at, mask=there, other=0).to(tl.int32), mask=there)


@keep_results.impl('cuda')
def triton_keep_results(results: Tensor, turn: Tensor, tokens: Tensor, status: Tensor) -> None:
    rows = tokens.shape[0]
    pdl = supports_pdl(results.device)
    _keep_results_kernel[(cdiv(rows, _BLOCK),)](
        results, turn, tokens, status, rows, results.stride(0), BLOCK=_BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip

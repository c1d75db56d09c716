"""What is reported of logits on a GPU: the best tokens and the normaliser, without sorting and in one pass each.

Bound: bytes, a row read once per op. Tiles of a row are worked on side by side; what they find is put together in the
order of the tiles, so that a row gives the same alone and in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.ops.logits import log_normaliser
from lmdeploy.ops.sample import ranked
from lmdeploy.ops.triton.draw import id_of, key_of, keys, ranks, value_of
from lmdeploy.ops.triton.launch import cdiv, gdc_launch_dependents, gdc_wait, next_power_of_2, supports_pdl

MOST = 32  # tokens that are ranked without sorting the row
_TILE = 1024


@triton.jit
def _tile_best_kernel(logits, found, vocab, tiles, TILE: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * vocab + at, mask=at < vocab, other=0.0).to(tl.float32)
    best = tl.topk(tl.where(at < vocab, ranks(keys(x), at), 0), MOST)
    tl.store(found + (row * tiles + tile) * MOST + tl.arange(0, MOST), best)


@triton.jit(do_not_specialize=['k'])
def _row_best_kernel(found, values, ids, number, k, SIZE: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.arange(0, SIZE)
    best = tl.topk(tl.load(found + row * number + at, mask=at < number, other=0), MOST)
    place = tl.arange(0, MOST)
    tl.store(values + row * k + place, value_of(key_of(best)), mask=place < k)
    tl.store(ids + row * k + place, id_of(best).to(tl.int64), mask=place < k)


@ranked.impl('cuda')
def triton_ranked(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    if k > MOST or not rows or not k:
        return ranked.reference(logits, k)
    logits, pdl, device = logits.contiguous(), supports_pdl(logits.device), logits.device
    tiles = cdiv(vocab, _TILE)
    found = torch.empty(rows, tiles * MOST, dtype=torch.int64, device=device)
    values, ids = torch.empty(rows, k, device=device), torch.empty(rows, k, dtype=torch.int64, device=device)
    _tile_best_kernel[(rows * tiles,)](logits, found, vocab, tiles, TILE=_TILE, MOST=MOST, PDL=pdl, launch_pdl=pdl)
    _row_best_kernel[(rows,)](
        found, values, ids, tiles * MOST, k, SIZE=next_power_of_2(tiles * MOST), MOST=MOST, PDL=pdl,
        num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    return values, ids


@triton.jit
def _tile_mass_kernel(logits, best, masses, vocab, tiles, TILE: tl.constexpr, PDL: tl.constexpr):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * vocab + at, mask=at < vocab, other=float('-inf')).to(tl.float32)
    most = tl.max(x, 0)
    shift = tl.where(most > float('-inf'), most, 0.0)
    tl.store(best + row * tiles + tile, most)
    tl.store(masses + row * tiles + tile, tl.sum(tl.exp(x - shift).to(tl.float64), 0))


@log_normaliser.impl('cuda')
def triton_log_normaliser(logits: Tensor) -> Tensor:
    rows, vocab = logits.shape
    logits, pdl = logits.contiguous(), supports_pdl(logits.device)
    tiles = cdiv(vocab, _TILE)
    best = torch.empty(rows, tiles, dtype=torch.float32, device=logits.device)
    masses = torch.empty(rows, tiles, dtype=torch.float64, device=logits.device)
    if rows:
        _tile_mass_kernel[(rows * tiles,)](logits, best, masses, vocab, tiles, TILE=_TILE, PDL=pdl, launch_pdl=pdl)
    most = best.double().amax(-1, keepdim=True)
    return (masses * (best - most).exp()).sum(-1).log() + most.squeeze(-1)

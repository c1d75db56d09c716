"""Attention of a step's queries over the paged cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmdeploy.kv.cache import KVLayer
from lmdeploy.ops.kv_codes import KeyBasis, KeyOffset, dequantise, hadamard
from lmdeploy.ops.table import op


@op
def paged_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, query_start: Sequence[int],
                    kv_lens: Sequence[int], scale: float, window: int) -> Tensor:
    """Causal attention: row i's n queries are the last n of its ``kv_lens[i]`` cached tokens.

    Args:
        q: ``[T, heads, D]``; heads is a multiple of kv_heads, query head h reads key head ``h // (heads/kv_heads)``.
        k_pages, v_pages: ``[blocks, kv_heads, block_size, D]``.
        block_table: ``[B, max_blocks] int32``.
        query_start: ``[B+1]`` host integers; tokens past the last one are padding and give 0.
        kv_lens: ``[B]`` host integers.
        scale: factor of the scores.
        window: a query sees itself and the ``window - 1`` tokens before it; 0 means all.

    Returns:
        ``[T, heads, D]`` of q's dtype, computed in float32.
    """
    kv_heads, block_size, dim = k_pages.shape[1:]

    def gather(row: int) -> tuple[Tensor, Tensor]:
        blocks = block_table[row, : -(-kv_lens[row] // block_size)].long()
        k, v = (pages[blocks].transpose(0, 1).reshape(kv_heads, -1, dim) for pages in (k_pages, v_pages))
        return k.float(), v.float()

    return _attend_rows(q, gather, query_start, kv_lens, scale, window)


def code_attention(q: Tensor, layer: KVLayer, offset: KeyOffset | None, block_table: Tensor, query_start: Sequence[int],
                   kv_lens: Sequence[int], scale: float, window: int, basis: KeyBasis | None = None) -> Tensor:
    """:func:`paged_attention` over pages of codes, which are made numbers again first.

    Args:
        offset: what was taken off the keys.
        basis: the axes of codes of 4 bits.
    """
    kv_heads, block_size = layer.k.shape[1:3]

    def gather(row: int) -> tuple[Tensor, Tensor]:
        blocks = block_table[row, : -(-kv_lens[row] // block_size)].long()
        k, v = read_codes(layer, blocks[None], offset, q.shape[-1], basis)
        return k[0], v[0]

    return _attend_rows(q, gather, query_start, kv_lens, scale, window)


def read_codes(layer: KVLayer, tables: Tensor, offset: KeyOffset | None, dim: int,
               basis: KeyBasis | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys and values ``[B, kv_heads, blocks * block_size, D] float32`` of rows with blocks ``tables [B, blocks]``."""
    k, v = (dequantise(pages[tables], scales[tables], dim).transpose(1, 2).flatten(2, 3)
            for pages, scales in zip((layer.k, layer.v), layer.scales))
    if layer.k.shape[-1] != dim:
        k = hadamard(k) if basis is None else k @ basis.queries.transpose(1, 2)  # A B^T = 1
    if offset is not None:
        positions = torch.arange(k.shape[2], dtype=torch.int32, device=k.device)
        k = k + offset.at(positions).transpose(0, 1)
    return k, v


def _attend_rows(q: Tensor, gather: Callable[[int], tuple[Tensor, Tensor]], query_start: Sequence[int],
                 kv_lens: Sequence[int], scale: float, window: int) -> Tensor:  # fmt: skip
    """Row by row, over keys and values ``[kv_heads, at least kv_lens[row], D] float32``."""
    heads, dim = q.shape[1:]
    out = torch.zeros_like(q)
    for row, kv_len in enumerate(kv_lens):
        first, last = query_start[row], query_start[row + 1]
        k, v = (pages[:, :kv_len] for pages in gather(row))
        kv_heads = k.shape[0]
        queries = q[first:last].float().view(last - first, kv_heads, heads // kv_heads, dim)
        scores = torch.einsum('tkgd,ksd->tkgs', queries, k) * scale
        at = torch.arange(kv_len - (last - first), kv_len, device=q.device)[:, None]
        key = torch.arange(kv_len, device=q.device)[None, :]
        hidden = (key > at) | (key <= at - window) if window else key > at
        weights = scores.masked_fill_(hidden[:, None, None, :], -torch.inf).softmax(-1)
        out[first:last] = torch.einsum('tkgs,ksd->tkgd', weights, v).reshape(last - first, heads, dim).to(q.dtype)
    return out


def attend_last(q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, kv_lens: Tensor, scale: float,
                window: int) -> Tensor:
    """:func:`paged_attention` of one query per row, its last token, without a look at a number on the device.

    Args:
        q: ``[B, heads, D]``. tables: ``[B, max_blocks] int32``. kv_lens: ``[B] int32``.
    """
    k, v = (pages[tables].transpose(1, 2).flatten(2, 3).float() for pages in (k_pages, v_pages))
    return attend_last_of(q, k, v, kv_lens, scale, window)


def attend_last_of(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor, scale: float, window: int) -> Tensor:
    """:func:`attend_last` over keys and values ``[B, kv_heads, keys, D] float32``."""
    rows, heads, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    queries = q.float().view(rows, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum('bkgd,bksd->bkgs', queries, k) * scale
    key = torch.arange(keys, device=q.device)[None, :]
    hidden = key >= kv_lens[:, None]
    if window:
        hidden = hidden | (key < kv_lens[:, None] - window)
    weights = scores.masked_fill_(hidden[:, None, None, :], -torch.inf).softmax(-1)
    return torch.einsum('bkgs,bksd->bkgd', weights, v).reshape(rows, heads, dim).to(q.dtype)

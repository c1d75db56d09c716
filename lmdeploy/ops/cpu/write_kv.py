"""Cache writes as one row copy per plane."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.kv.cache import KVLayer
from lmdeploy.ops.kv_codes import KeyBasis, as_coded, quantise
from lmdeploy.ops.write_kv import write_kv


def row_index(slots: Tensor, kv_heads: int, block_size: int) -> Tensor:
    """``[T * kv_heads] int64``: where the rows of D channels lie in a plane flattened to ``[rows, D]``."""
    block = torch.div(slots, block_size, rounding_mode='floor')
    heads = torch.arange(kv_heads, device=slots.device)
    return ((block[:, None] * kv_heads + heads) * block_size + (slots - block * block_size)[:, None]).flatten()


def write_rows(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, index: Tensor) -> None:
    """As :func:`write_kv`, with the rows of :func:`row_index`."""
    dim = k.shape[-1]
    for new, pages in ((k, k_pages), (v, v_pages)):
        rows = torch.nan_to_num(new, 0.0, 0.0, 0.0).to(pages.dtype).view(-1, dim)
        pages.view(-1, dim).index_copy_(0, index, rows)


def write_code_rows(k: Tensor, v: Tensor, layer: KVLayer, index: Tensor, basis: KeyBasis | None) -> None:
    """As :func:`lmdeploy.ops.kv_codes.store_codes`, with the rows of :func:`row_index`."""
    bits = 8 * layer.k.shape[-1] // k.shape[-1]
    if bits == 4:
        k = as_coded(torch.nan_to_num(k, 0.0, 0.0, 0.0), None if basis is None else basis.keys)
    for new, pages, scale_pages in zip((k, v), (layer.k, layer.v), layer.scales):
        codes, scales = quantise(new, bits)
        pages.view(-1, pages.shape[-1]).index_copy_(0, index, codes.view(-1, pages.shape[-1]))
        scale_pages.view(-1, 2).index_copy_(0, index, scales.view(-1, 2))


@write_kv.impl('cpu')
def write_kv_rows(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    write_rows(k, v, k_pages, v_pages, row_index(slots, *k_pages.shape[1:3]))

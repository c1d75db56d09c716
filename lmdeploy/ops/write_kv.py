"""Store the keys and values of a step's tokens in the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.ops.table import op


@op
def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Write token t's keys and values to position ``slots[t]`` of the cache, in place.

    The cache stays finite whatever is written: a non-finite value is stored as 0, because a block is reused without
    being cleared and ``0 * nan`` would carry one request's fault into another.

    Args:
        k, v: ``[T, kv_heads, D]``, any floating-point type.
        k_pages, v_pages: ``[blocks, kv_heads, block_size, D]``.
        slots: ``[T] int64``: block * block_size + offset.
    """
    _, _, block_size, _ = k_pages.shape
    block, offset = slots // block_size, slots % block_size
    for new, pages in ((k, k_pages), (v, v_pages)):
        pages[block, :, offset] = torch.nan_to_num(new, 0.0, 0.0, 0.0).to(pages.dtype)

"""ForwardBatch: the device's view of one forward pass, the only thing that layers learn about scheduling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class ForwardBatch:
    """B rows with T query tokens in all; row i's tokens are ``query_start[i]:query_start[i+1]``.

    ``max_query`` and ``max_kv`` are host integers, and ``host_*`` lists are the host's own copies of the small index
    tensors, so that no layer ever has to ask the device for a number.
    """

    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32 ([3, T] for m-rope)
    kv_slots: Tensor  # [T] int64: block * block_size + offset; padding tokens point into the null block 0
    query_start: Tensor  # [B+1] int32
    kv_lens: Tensor  # [B] int32: tokens in the cache after this step's writes
    block_table: Tensor  # [B, max_blocks] int32, padded with the null block
    output_rows: Tensor  # [R] int64: which of the T tokens give logits
    max_query: int
    max_kv: int
    host_query_start: list[int]
    host_kv_lens: list[int]
    plan: Any = None  # the attention backend's private data for this step
    embeds: Any = None  # image embeddings and where they go

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_rows(self) -> int:
        return len(self.host_kv_lens)

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

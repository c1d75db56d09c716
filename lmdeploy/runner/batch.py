"""ForwardBatch: the device's view of one forward pass, the only thing that layers learn about scheduling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_UNSET: Any = None


@dataclass(slots=True)
class ImageEmbeds:
    """What stands in the place of the embeddings of some tokens of a step.

    Attributes:
        rows: ``[n] int64``, which of the T tokens.
        values: ``[n, hidden]``, of the model's type.
    """

    rows: Tensor
    values: Tensor


@dataclass(slots=True)
class ForwardBatch:
    """B rows with T query tokens in all; row i's tokens are ``query_start[i]:query_start[i+1]``.

    ``max_query`` and ``max_kv`` are host integers, and ``host_*`` lists are the host's own copies of the small index
    tensors, so that no layer ever has to ask the device for a number.

    A ``static`` batch is one whose tensors are filled on the device while a graph replays: every row has one query
    token, ``max_kv`` is the most that a row may ever have, and the ``host_*`` lists are empty. What runs on it may only
    launch kernels, on grids that do not depend on the numbers in its tensors.
    """

    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32, or [3, T] for a model whose positions have three rows (equal ones where it is [T])
    kv_slots: Tensor  # [T] int64: block * block_size + offset; padding tokens point into the null block 0
    query_start: Tensor  # [B+1] int32
    kv_lens: Tensor  # [B] int32: tokens in the cache after this step's writes
    block_table: Tensor  # [N, max_blocks] int32, padded with the null block
    output_rows: Tensor  # [R] int64: which of the T tokens give logits
    max_query: int
    max_kv: int
    host_query_start: list[int]
    host_kv_lens: list[int]
    plan: Any = None  # the attention backend's private data for this step
    embeds: ImageEmbeds | None = None  # None: the step has no tokens of pictures
    table_rows: Tensor = field(default=_UNSET)  # [B] int32: row i reads block_table[table_rows[i]]; else its own row i
    num_decode: int = 0  # so many leading rows have exactly one query token
    static: bool = False

    def __post_init__(self) -> None:
        if self.table_rows is None:
            self.table_rows = torch.arange(self.kv_lens.shape[0], dtype=torch.int32, device=self.kv_lens.device)

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_rows(self) -> int:
        return self.kv_lens.shape[0]

    @property
    def every_row(self) -> bool:
        """Whether ``output_rows`` are all tokens in their order: one token per row, which gives an output."""
        return self.max_query == 1 and self.output_rows.shape[0] == self.num_tokens

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def tables(self) -> Tensor:
        """``[B, max_blocks] int32``: the block tables in the order of the rows."""
        return self.block_table[self.table_rows]

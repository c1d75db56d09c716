"""Token embedding: rows of a table."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lmdeploy.ops.table import op


@op
def embed(ids: Tensor, table: Tensor, scale: float) -> Tensor:
    """``table[ids] * scale``: ``ids [T]`` integers, ``table [V, D]`` give ``[T, D]`` of the table's type.

    ``scale`` is a number of the table's type; the product is rounded to it.
    """
    x = F.embedding(ids, table)
    return x if scale == 1.0 else x * scale

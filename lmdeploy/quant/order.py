"""Input channels in an order of their own: which group each belongs to, and the order that makes groups contiguous."""

from __future__ import annotations

import torch
from torch import Tensor


def order_of(groups: Tensor, size: int) -> Tensor | None:
    """The order ``[in] int64`` in which channels of the same group lie together; None where they do already.

    Args:
        groups: ``[in]``, the group of every channel. size: channels of a group; 0: there is one group.

    Raises:
        ValueError: a group has another number of channels.
    """
    count = groups.shape[0]
    groups = groups.to(torch.int64)
    wanted = torch.arange(count, device=groups.device) // (size or max(count, 1))
    if torch.equal(groups, wanted):
        return None
    found, order = groups.sort(stable=True)
    if not torch.equal(found, wanted):
        raise ValueError(f'g_idx does not give every group {size or count} channels')
    return order


def groups_of(order: Tensor | None, count: int, size: int) -> Tensor:
    """The inverse: ``[in] int32``, the group of each of ``count`` channels."""
    groups = torch.arange(count, dtype=torch.int32) // (size or max(count, 1))
    return groups if order is None else unordered(groups.to(order.device), order)


def ordered(rows: Tensor, order: Tensor | None) -> Tensor:
    """``rows [in, ...]`` in that order."""
    return rows if order is None else rows[order]


def unordered(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows that lie in that order, as they were."""
    if order is None:
        return rows
    out = torch.empty_like(rows)
    out[order] = rows
    return out

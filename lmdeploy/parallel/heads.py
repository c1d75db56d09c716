"""Heads of attention over ranks: which query heads and which key heads a rank computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.parallel.split import share


@dataclass(frozen=True, slots=True)
class HeadShare:
    """A rank's heads, such that each of ``keys`` serves as many of ``queries``, one key's after the other's.

    Attributes:
        queries: query heads of the model; -1 is a head of zeros, which fills up a key's group.
        keys: key heads of the model. Ranks may hold the same one.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]


def share_heads(heads: int, kv_heads: int, rank: int, size: int) -> HeadShare:
    """The heads of ``rank`` of ``size``; over all ranks every query head occurs once.

    With at least as many key heads as ranks, whole groups are shared out, so that no key is stored twice. With fewer,
    each rank keeps the keys that its query heads need: as many ranks share each key's group, where that can be, else
    all query heads are shared out evenly, and where a rank's heads use their keys unequally often, zeros fill the
    smaller groups. A rank without heads has one of zeros.

    Raises:
        ValueError: the query heads are no multiple of the key heads.
    """
    if heads % kv_heads:
        raise ValueError(f'{heads} query heads over {kv_heads} key heads')
    group = heads // kv_heads
    if kv_heads >= size:
        own = share(heads, rank, size, group)
    elif size % kv_heads == 0:  # the ranks of one key share its group
        copies = size // kv_heads
        part, first = share(group, rank % copies, copies), rank // copies * group
        own = range(first + part.start, first + part.stop)
    else:
        own = share(heads, rank, size)
    if not own:
        return HeadShare((-1,), (0,))
    keys = range(own[0] // group, own[-1] // group + 1)
    served = [[head for head in own if head // group == key] for key in keys]
    widest = max(map(len, served))
    return HeadShare(tuple(head for heads in served for head in heads + [-1] * (widest - len(heads))), tuple(keys))



def channels(heads: tuple[int, ...], head_dim: int) -> Tensor:
    """``[len(heads) * head_dim] int64``: the channels of ``heads``; -1 for those of a head of zeros."""
    first = torch.tensor(heads)[:, None]
    return torch.where(first < 0, -1, first * head_dim + torch.arange(head_dim)).flatten()

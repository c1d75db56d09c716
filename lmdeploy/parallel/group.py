"""Group: the ranks that share one model. A group of one is made of no-ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transport(Protocol):
    """What carries tensors between ranks; see :mod:`lmdeploy.parallel.distributed`.

    All ranks get the same bits: whatever is computed from them next is the same everywhere.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks; ``x`` may be overwritten."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """``[size, *x.shape]``: all ranks' ``x``, which have one shape."""
        ...

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """Rank ``source``'s ``x``; that of the others is overwritten."""
        ...


@dataclass(frozen=True, slots=True)
class Group:
    """``size`` ranks of which this is ``rank``; every rank calls the same operations in the same order.

    ``device`` is where this rank's tensors lie.
    """

    rank: int = 0
    size: int = 1
    transport: Transport | None = None
    device: torch.device | None = None

    def __post_init__(self) -> None:
        if self.transport is None and (self.size != 1 or self.rank != 0):
            raise ValueError(f'rank {self.rank} of {self.size}: only a group of one has no transport')

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, which may be overwritten."""
        return x if self.transport is None else self.transport.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' ``x [T, n]``, joined along the last dimension in the order of ranks."""
        if self.transport is None:
            return x
        return self.transport.all_gather(x).movedim(0, -2).flatten(-2)

    def exchange(self, x: Tensor) -> Tensor:
        """``[size, n]``: all ranks' ``x [1, n]`` of the host, on the host; slow."""
        return x if self.transport is None else self.transport.all_gather(x.to(self.device)).flatten(0, 1).cpu()

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Rank ``source``'s ``x``; that of the others is overwritten."""
        return x if self.transport is None else self.transport.broadcast(x, source)


ALONE = Group()

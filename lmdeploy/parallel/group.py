"""Group: the ranks that share one model. A group of one is made of no-ops."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """``size`` ranks of which this is ``rank``; every rank calls the same operations in the same order."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if self.size != 1 or self.rank != 0:
            raise ValueError(f'rank {self.rank} of {self.size}: only a group of one has no transport')

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``."""
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """All ranks' ``x``, joined along ``dim`` in the order of ranks."""
        return x

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Rank ``source``'s ``x``."""
        return x


ALONE = Group()

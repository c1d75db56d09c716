"""Split: which slice of a linear layer belongs to a rank."""

from __future__ import annotations

import enum


class Split(enum.Enum):
    """How a layer is divided over the ranks of a group.

    ``NONE``: every rank holds the whole layer. ``OUT``: a rank holds a range of output features of each part, so that
    its output is a slice. ``IN``: a rank holds a range of input features, so that outputs are summed over the ranks.
    """

    NONE = 'none'
    OUT = 'out'
    IN = 'in'


def share(features: int, rank: int, size: int, unit: int = 1) -> range:
    """Rank ``rank``'s features of ``features``, in whole units (heads, quantisation groups); the first ranks get more.

    Where there are fewer units than ranks, units are replicated: ``size / units`` ranks hold the same one (the rule of
    grouped-query attention with more ranks than key heads).

    Raises:
        ValueError: the features are not whole units, or the units cannot be replicated evenly.
    """
    if features % unit:
        raise ValueError(f'{features} features are not whole units of {unit}')
    units = features // unit
    if units < size:
        if size % units:
            raise ValueError(f'{units} units cannot be replicated evenly over {size} ranks')
        first = rank // (size // units)
        return range(first * unit, (first + 1) * unit)
    least, more = divmod(units, size)
    first = rank * least + min(rank, more)
    return range(first * unit, (first + least + (rank < more)) * unit)

"""Split: which slice of a linear layer belongs to a rank."""

from __future__ import annotations

import enum

UNIT = 128  # channels: the usual group of quantised weights, and a whole number of every kernel's tiles


class Split(enum.Enum):
    """How a layer is divided over the ranks of a group.

    ``NONE``: every rank holds the whole layer. ``OUT``: a rank holds some output features of each part, so that its
    output is a slice. ``IN``: a rank holds some input features, so that outputs are summed over the ranks.
    """

    NONE = 'none'
    OUT = 'out'
    IN = 'in'


def share(features: int, rank: int, size: int, unit: int = 1) -> range:
    """Rank ``rank``'s features of ``features``, in whole units (heads, groups); the first ranks get more, the last may
    get none.

    Raises:
        ValueError: the features are not whole units.
    """
    if features % unit:
        raise ValueError(f'{features} features are not whole units of {unit}')
    least, more = divmod(features // unit, size)
    first = rank * least + min(rank, more)
    return range(first * unit, (first + least + (rank < more)) * unit)


def share_channels(features: int, rank: int, size: int) -> range:
    """Rank ``rank``'s channels of a layer whose channels are independent of each other.

    They come in the largest unit, of at most :data:`UNIT`, of which there is at least one for every rank.

    Raises:
        ValueError: there are fewer channels than ranks.
    """
    if features < size:
        raise ValueError(f'{features} channels over {size} ranks')
    unit = UNIT
    while features % unit or features // unit < size:
        unit //= 2
    return share(features, rank, size, unit)

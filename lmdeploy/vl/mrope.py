"""Positions of a prompt with pictures in a decoder with three rows of them (Qwen2-VL's M-RoPE, Wang et al. 2024).

A text token has the same position in all three rows. The tokens of a picture share the first, and lie at their row and
column in the other two; what follows goes on behind the largest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class GridSpan:
    """A picture in a prompt: its first token, and the rows and columns of its tokens (``Layout.grid``)."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns


def mrope_positions(length: int, spans: Iterable[GridSpan]) -> tuple[np.ndarray, int]:
    """Positions of a prompt of ``length`` tokens, and of what follows it.

    Args:
        spans: the pictures in order, which do not overlap.

    Returns:
        ``[3, length] int32``, and the difference between a later token's position (the same in all rows) and its place
        in the sequence; 0 without pictures.
    """
    positions = np.empty((3, length), np.int32)
    at = position = 0
    for span in spans:
        if span.start < at or span.stop > length:
            raise ValueError(f'a picture at {span.start}:{span.stop} in {length} tokens, of which {at} are taken')
        positions[:, at:span.start] = np.arange(position, position + span.start - at)
        position += span.start - at
        place = np.arange(span.stop - span.start)
        positions[:, span.start:span.stop] = position
        positions[1, span.start:span.stop] += place // span.columns
        positions[2, span.start:span.stop] += place % span.columns
        position += max(span.rows, span.columns)
        at = span.stop
    positions[:, at:] = np.arange(position, position + length - at)
    return positions, position + (length - at) - length

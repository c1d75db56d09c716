"""Hidden states of the calibration tokens, between one layer and the next: in memory, or in a file if they are many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

IN_MEMORY = 2 << 30  # bytes; more goes to a file beside the output


@dataclass(frozen=True, slots=True)
class Piece:
    """So many sequences of one length, of all tokens those from ``start`` on."""

    start: int
    sequences: int
    length: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.sequences * self.length)


def pieces_of(lengths: Sequence[int], batch: int) -> list[Piece]:
    """Runs of up to ``batch`` neighbouring sequences of one length."""
    found: list[Piece] = []
    start = 0
    for length in lengths:
        last = found[-1] if found else None
        if last is not None and last.length == length and last.sequences < batch:
            found[-1] = Piece(last.start, last.sequences + 1, length)
        else:
            found.append(Piece(start, 1, length))
        start += length
    return found


class Hidden:
    """``[tokens, hidden]`` of one stream, changed in place layer by layer.

    Args:
        sequences: token ids of each.
        width: hidden size.
        batch: sequences that are computed at once.
        device: where pieces are computed.
        file: where they lie if they need more than IN_MEMORY bytes.
        dtype: float32, or what a GPU computes the layers in.
    """

    def __init__(self, sequences: Sequence[Tensor], width: int, batch: int, device: torch.device, file: Path,
                 dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
        self.sequences, self.width, self.device = tuple(sequences), width, device
        self.pieces = pieces_of([len(ids) for ids in sequences], batch)
        self.tokens = sum(len(ids) for ids in sequences)
        size = self.tokens * width * dtype.itemsize
        if size <= IN_MEMORY:
            self._states = torch.empty(self.tokens, width, dtype=dtype)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, 'wb') as made:
                made.truncate(size)
            self._states = torch.from_file(str(file), shared=True, size=self.tokens * width,
                                           dtype=dtype).view(self.tokens, width)  # fmt: skip
            file.unlink()  # its blocks go when the last view does, also if this program is killed

    def fill(self, embedding: Tensor, scale: float) -> None:
        """Begin with the embeddings of all tokens: rows of ``embedding [vocab, hidden]``, times ``scale``."""
        for piece in self.pieces:
            ids = torch.cat(self.sequences)[piece.tokens].to(embedding.device)
            self._states[piece.tokens] = (embedding[ids].float() * scale).to(self._states.dtype).cpu()

    def __iter__(self) -> Iterator[tuple[Piece, Tensor]]:
        """Every piece, ``[sequences, length, hidden]`` on the device."""
        for piece in self.pieces:
            yield piece, self.read(piece)

    def read(self, piece: Piece) -> Tensor:
        return self._states[piece.tokens].view(piece.sequences, piece.length, self.width).to(self.device)

    def write(self, piece: Piece, values: Tensor) -> None:
        self._states[piece.tokens] = values.reshape(-1, self.width).to(self._states.dtype).cpu()

"""DeviceTables: what a device keeps of every slot, so that a step needs little from the host and can be a graph.

Block tables and sampling parameters lie in tensors that never move, one row per slot and one more, the *scratch* slot
``size``, for the padding rows of a graph: its block table is all null blocks, so whatever a padding row does is
harmless. Rows are written when a slot is opened, block tables as blocks come; nothing is cleared when a slot is
closed, because nothing of it is read any more.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lmdeploy.ops.slots import CHANGES, SamplingTables

ALIGN = 16  # bytes
REALS = ('temperature', 'top_p', 'min_p', 'repetition', 'presence', 'frequency')
INTEGERS = ('top_k', 'has_penalty', 'prompt_len')


class DeviceTables:
    """Tables of ``slots`` requests with at most ``session_len`` tokens each.

    Attributes:
        blocks: ``[slots + 1, width] int32``: block tables, padded with the null block.
        shift: ``[slots + 1] int32``: how far the rotary position of a token after all pictures is from its place.
        sampling: the rest.
    """

    def __init__(self, slots: int, session_len: int, block_size: int, vocab_size: int, device: torch.device) -> None:
        self.size, self.device = slots, device
        rows = slots + 1
        self.blocks = torch.zeros(rows, -(-session_len // block_size), dtype=torch.int32, device=device)
        self.shift = torch.zeros(rows, dtype=torch.int32, device=device)
        self._scalars = torch.zeros(len(REALS) + len(INTEGERS), rows, dtype=torch.int32, device=device)
        self._changes = torch.zeros(3, rows, CHANGES, dtype=torch.int32, device=device)
        self._changes[0] = -1
        fields: dict[str, Tensor] = {name: row.view(torch.float32) for name, row in zip(REALS, self._scalars)}
        fields |= dict(zip(INTEGERS, self._scalars[len(REALS):]))
        for name in ('top_p', 'repetition'):
            fields[name].fill_(1.0)
        self.sampling = SamplingTables(
            last_token=torch.zeros(rows, dtype=torch.int32, device=device),
            seed=torch.zeros(rows, dtype=torch.int64, device=device),
            change_ids=self._changes[0],
            change_values=self._changes[1].view(torch.float32),
            change_until=self._changes[2],
            seen=torch.zeros(rows, vocab_size, dtype=torch.int16, device=device),
            **fields,
        )

    @staticmethod
    def nbytes(slots: int, session_len: int, block_size: int, vocab_size: int) -> int:
        """Bytes of the large ones."""
        return (slots + 1) * (4 * -(-session_len // block_size) + 2 * vocab_size + 12 * CHANGES)

    def open(self, slots: np.ndarray, reals: np.ndarray, integers: np.ndarray, seeds: np.ndarray,
             changes: np.ndarray) -> None:
        """Set the rows of ``slots [n]``.

        Args:
            reals, integers: ``[fields, n]``, in the order of ``REALS`` and ``INTEGERS``.
            seeds: ``[n] uint64``. changes: ``[3, n, CHANGES] int32``: ids, the bits of float32 values, ends.
        """
        scalars = np.concatenate([reals.astype(np.float32).view(np.int32), integers.astype(np.int32)])
        index, seeds_ = send(self.device, slots.astype(np.int64), seeds.view(np.int64))
        scalars_, changes_ = send(self.device, scalars, changes)
        self._scalars.index_copy_(1, index, scalars_)
        self._changes.index_copy_(1, index, changes_)
        self.sampling.seed.index_copy_(0, index, seeds_)

    def count(self, slot: int, tokens: np.ndarray, counts: np.ndarray) -> None:
        """Set what ``slot`` has seen: ``tokens [n]``, each once, with its entry of ``seen``."""
        seen = self.sampling.seen[slot].zero_()
        index, = send(self.device, tokens.astype(np.int64))
        values, = send(self.device, counts.astype(np.int16))
        seen.index_copy_(0, index, values)

    def append(self, slots: np.ndarray, columns: np.ndarray, blocks: np.ndarray) -> None:
        """``blocks[slots[i], columns[i]] = blocks[i]``."""
        index, = send(self.device, slots.astype(np.int64) * self.blocks.shape[1] + columns)
        values, = send(self.device, blocks.astype(np.int32))
        self.blocks.view(-1).index_copy_(0, index, values)


def send(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """``arrays`` of one type on ``device``, in one copy that nobody waits for.

    Each begins at a multiple of 16 bytes, whatever their sizes are: kernels are compiled anew for other alignments.
    """
    unit = ALIGN // arrays[0].itemsize
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-array.size // unit) * unit)
    on_gpu = device.type != 'cpu'
    staged = torch.empty(starts[-1], dtype=torch.from_numpy(arrays[0][:0]).dtype, pin_memory=on_gpu)
    flat = staged.numpy()
    for array, start in zip(arrays, starts):
        flat[start : start + array.size] = array.reshape(-1)
    if on_gpu:
        staged = staged.to(device, non_blocking=True)  # the allocator keeps the host's side until it is read
    return [staged[start : start + array.size].view(array.shape) for array, start in zip(arrays, starts)]

"""Uploader: tensors from files straight into a device's memory.

A tensor is read in pieces by several threads into pinned buffers, from which the device copies while the next pieces
are read; it never lies on the host as a whole. Reading from the page cache is a copy by the processor, so threads
matter: one alone is several times slower than the bus.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lmdeploy.weights.bytefile import ByteFile

PIECE = 16 << 20  # bytes
BUFFERS = 8


class Uploader:
    """Reads ranges of files to ``device``; used by one thread, closed when all is read.

    On a CPU the buffers are plain memory, for tests.
    """

    def __init__(self, device: torch.device, *, piece: int = PIECE, buffers: int = BUFFERS) -> None:
        self.device, self._on_gpu = device, device.type != 'cpu'
        self._buffers = [torch.empty(piece, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(buffers)]
        self._copied = [torch.cuda.Event() if self._on_gpu else None for _ in range(buffers)]
        self._threads = ThreadPoolExecutor(buffers)
        self._turn = 0

    def read(self, file: ByteFile, offset: int, nbytes: int) -> Tensor:
        """``[nbytes] uint8`` on the device, in the order of its current stream.

        Raises:
            LoadError: LMD-123, LMD-139: the file cannot be read.
        """
        out = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        piece, count = self._buffers[0].numel(), len(self._buffers)
        starts = range(0, nbytes, piece)
        pending = [self._start(file, offset, at, min(piece, nbytes - at)) for at in starts[:count]]
        for place, at in enumerate(starts):
            turn, reading = pending[place]
            reading.result()
            size = min(piece, nbytes - at)
            out[at : at + size].copy_(self._buffers[turn][:size], non_blocking=True)
            if (event := self._copied[turn]) is not None:
                event.record()
            if place + count < len(starts):
                after = starts[place + count]
                pending.append(self._start(file, offset, after, min(piece, nbytes - after)))
        return out

    def close(self) -> None:
        """Let go of threads and buffers, when the device has copied everything."""
        self._threads.shutdown()
        for event in self._copied:
            if event is not None:
                event.synchronize()
        self._buffers.clear()

    def _start(self, file: ByteFile, offset: int, at: int, size: int) -> tuple[int, Future[None]]:
        """Let a thread fill the next buffer, once the device has copied what is in it."""
        turn, self._turn = self._turn, (self._turn + 1) % len(self._buffers)
        buffer, event = self._buffers[turn], self._copied[turn]

        def fill() -> None:
            if event is not None:
                event.synchronize()
            file.read_into(offset + at, buffer[:size].numpy().data)

        return turn, self._threads.submit(fill)

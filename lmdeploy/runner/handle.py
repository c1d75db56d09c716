"""A launched step: its tensors on their way to the host, and the StepResult that they become."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lmdeploy.engine.plan import NO_MEMORY, OK, Logprobs, StepResult
from lmdeploy.runner.sampler import Sampled


@dataclass(slots=True)
class Download:
    """Copies of device tensors that arrive on the host without anyone waiting; on a CPU they are there already."""

    tensors: list[Tensor]
    arrived: torch.cuda.Event | None = None

    @classmethod
    def start(cls, tensors: list[Tensor], device: torch.device) -> Download:
        """Without tensors it is over when the step is: nobody runs ahead of the device without end."""
        if device.type == 'cpu':
            return cls(tensors)
        host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(device))
        return cls(host, arrived)

    def wait(self) -> list[Tensor]:
        if self.arrived is not None:
            self.arrived.synchronize()
            self.arrived = None
        return self.tensors


@dataclass(slots=True)
class Launched:
    """A step that runs or ran; implements the executor's ``StepHandle``.

    Attributes:
        rows: how many rows the plan has.
        sampled: what was drawn; None: no row drew.
        failure: why no row of it ran.
        lost: why its pictures were not encoded.
        logits, hidden: by plan row ``[positions, vocab]`` and ``[positions, hidden]``, float32 on the device.
    """

    step: int
    rows: int
    sampled: Sampled | None = None
    logits: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    failure: str = ''
    lost: str = ''
    _download: Download = field(default_factory=lambda: Download([]))

    def send(self, device: torch.device) -> Launched:
        """Start the copies to the host."""
        tensors: list[Tensor] = []
        if self.sampled is not None:
            tensors += [self.sampled.tokens, self.sampled.accepted, self.sampled.status]
            if (report := self.sampled.logprobs) is not None:
                tensors += [report.chosen, report.ids, report.values]
        tensors += [*self.logits.values(), *self.hidden.values()]
        self._download = Download.start(tensors, device)
        return self

    def result(self) -> StepResult:
        """Wait for the step and put its result together."""
        tensors = iter(self._download.wait())
        result = StepResult(
            step=self.step,
            status=np.zeros(self.rows, np.uint8),
            token_start=np.zeros(self.rows + 1, np.int32),
            tokens=np.zeros(0, np.int32),
            lost=self.lost,
        )
        if self.failure:
            result.status[:] = NO_MEMORY
            result.errors = dict.fromkeys(range(self.rows), self.failure)
        if self.sampled is not None:
            _read_tokens(result, self.sampled, tensors)
        result.logits = {row: next(tensors) for row in self.logits}
        result.hidden = {row: next(tensors) for row in self.hidden}
        return result


def _read_tokens(result: StepResult, sampled: Sampled, tensors: Iterator[Tensor]) -> None:
    """Fill in tokens, statuses and log-probabilities from ``tensors``, in the order in which they were sent."""
    sites = sampled.sites
    drawn, accepted, status = (next(tensors).numpy() for _ in range(3))
    counts = np.zeros(len(result.status), np.int64)
    counts[sites.rows], result.status[sites.rows] = accepted, status
    np.cumsum(counts, out=result.token_start[1:])
    row_of = np.repeat(np.arange(len(accepted)), np.diff(sites.start))
    kept = np.arange(len(drawn)) - sites.start[:-1][row_of] < accepted[row_of]
    result.tokens = drawn[kept].astype(np.int32)
    rows = sites.rows[row_of]  # the plan's row of every site
    result.errors = {int(rows[site]): text for site, text in sampled.errors.items() if result.status[rows[site]] != OK}
    if (report := sampled.logprobs) is not None:
        chosen, ids, values = (next(tensors).numpy() for _ in range(3))
        for row in np.unique(rows[report.sites]).tolist():
            mine = np.flatnonzero((rows[report.sites] == row) & kept[report.sites])
            if len(mine):
                k = int(report.wanted[mine[0]])
                result.logprobs[row] = Logprobs(chosen[mine], ids[mine, :k], values[mine, :k])

"""A launched step: its tensors on their way to the host, and the StepResult that they become."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lmdeploy.engine.plan import OK, Logprobs, StepResult
from lmdeploy.runner.sampler import Sampled, Sites


@dataclass(slots=True)
class Download:
    """Copies of device tensors that arrive on the host without anyone waiting; on a CPU they are there already."""

    tensors: list[Tensor]
    arrived: torch.cuda.Event | None = None

    @classmethod
    def start(cls, tensors: list[Tensor]) -> Download:
        if not tensors or tensors[0].device.type == 'cpu':
            return cls(tensors)
        host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(tensors[0].device))
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
        rows: how many rows the plan has. sampling: ``[b] int64``: the plan's rows that draw tokens.
        logits: by plan row ``[positions, vocab] float32``; hidden: by plan row ``[positions, hidden] float32``; host
            tensors once ``bulk`` has arrived.
    """

    step: int
    rows: int
    sampling: np.ndarray
    sites: Sites | None
    sampled: Sampled | None
    logits: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    download: Download | None = None

    def send(self) -> Launched:
        """Start the copies to the host."""
        tensors: list[Tensor] = []
        if self.sampled is not None:
            tensors += [self.sampled.tokens, self.sampled.accepted, self.sampled.status]
            if (report := self.sampled.logprobs) is not None:
                tensors += [report.chosen, report.ids, report.values]
        tensors += [*self.logits.values(), *self.hidden.values()]
        self.download = Download.start(tensors)
        return self

    def result(self) -> StepResult:
        """Wait for the step and put its result together."""
        tensors = iter(self.download.wait())
        status = np.zeros(self.rows, np.uint8)
        counts = np.zeros(self.rows, np.int64)
        tokens = np.zeros(0, np.int32)
        logprobs: dict[int, Logprobs] = {}
        errors: dict[int, str] = {}
        if self.sampled is not None:
            drawn, accepted = next(tensors).numpy(), next(tensors).numpy()
            status[self.sampling], counts[self.sampling] = next(tensors).numpy(), accepted
            start = self.sites.start
            row_of = np.repeat(np.arange(len(accepted)), np.diff(start))
            within = np.arange(len(drawn)) - start[:-1][row_of]
            tokens = drawn[within < accepted[row_of]].astype(np.int32)
            if self.sampled.logprobs is not None:
                logprobs = self._logprobs(*(next(tensors).numpy() for _ in range(3)), row_of, within, accepted)
            errors = {int(self.sampling[row_of[site]]): text for site, text in self.sampled.errors.items()
                      if status[self.sampling[row_of[site]]] != OK}
        return StepResult(
            step=self.step,
            status=status,
            token_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            tokens=tokens,
            logprobs=logprobs,
            logits={row: next(tensors) for row in self.logits},
            hidden={row: next(tensors) for row in self.hidden},
            errors=errors,
        )

    def _logprobs(self, chosen: np.ndarray, ids: np.ndarray, values: np.ndarray, row_of: np.ndarray, within: np.ndarray,
                  accepted: np.ndarray) -> dict[int, Logprobs]:
        report = self.sampled.logprobs
        out = {}
        rows = row_of[report.sites]
        for row in np.unique(rows).tolist():
            mine = np.flatnonzero((rows == row) & (within[report.sites] < accepted[row]))
            if len(mine):
                k = int(report.wanted[mine[0]])
                out[int(self.sampling[row])] = Logprobs(chosen[mine], ids[mine, :k], values[mine, :k])
        return out

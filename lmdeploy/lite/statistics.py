"""Gathering what a site's inputs are like, piece by piece, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.errors import LoadError
from lmdeploy.lite.recipe import SAMPLE, Need, SiteStatistics


class Gatherer:
    """The statistics of one site; pieces come in the order of the tokens.

    Args:
        name: of the site, for messages. width: its input channels. total: tokens that will come. needs: of the recipe.
    """

    def __init__(self, name: str, width: int, total: int, needs: frozenset[Need], device: torch.device) -> None:
        self.name, self.total, self.seen = name, total, 0
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._most = torch.zeros(width, device=device)
        self._hessian = torch.zeros(width, width, device=device) if 'hessian' in needs else None
        self._cross = torch.zeros(width, width, device=device) if 'cross' in needs else None
        wanted = min(SAMPLE, total) if 'sample' in needs else 0
        self._picked = torch.arange(wanted) * total // max(wanted, 1)  # evenly spaced tokens
        self._sample = torch.empty(wanted, width, device=device)

    def add(self, x: Tensor, x_float: Tensor | None = None) -> None:
        """Take ``x [..., in]``, and what the unquantised model has in its place where the cross statistics need it.

        Raises:
            LoadError: LMD-602: a value is not finite.
        """
        x = x.detach().reshape(-1, x.shape[-1])
        magnitudes = x.abs().float()
        most = magnitudes.amax(0)
        if not bool(torch.isfinite(most).all()):
            channel = int((~torch.isfinite(most)).nonzero()[0])
            raise LoadError('LMD-602', site=self.name, channel=channel)
        self._sum += magnitudes.sum(0, dtype=torch.float64)
        self._most = torch.maximum(self._most, most)
        if self._hessian is not None:
            _add_products(self._hessian, x, x)
        if self._cross is not None and x_float is not None:
            _add_products(self._cross, x_float.reshape(x.shape) - x, x)
        here = (self._picked >= self.seen) & (self._picked < self.seen + len(x))
        if bool(here.any()):
            rows = (self._picked[here] - self.seen).to(x.device)
            self._sample[here.nonzero().flatten().to(x.device)] = x[rows].float()
        self.seen += len(x)

    def finish(self) -> SiteStatistics:
        """Means over all that came."""
        count = max(self.seen, 1)
        for matrix in (self._hessian, self._cross):
            if matrix is not None:
                matrix.div_(count)
        return SiteStatistics(self.seen, (self._sum / count).float(), self._most, self._hessian,
                              self._sample if len(self._picked) else None, self._cross)  # fmt: skip


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a^T b`` in float32; a GPU sums up 16-bit values so without a copy of them."""
    if a.dtype is torch.float32:
        total.addmm_(a.t(), b)
    elif a.device.type == 'cpu':
        total.addmm_(a.float().t(), b.float())
    else:
        total += torch.mm(a.t(), b, out_dtype=torch.float32)

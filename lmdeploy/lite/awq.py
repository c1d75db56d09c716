"""AWQ: scales that move precision to the inputs that matter (Lin et al. 2023), searched by the error of outputs.

A channel's scale is ``s = x^r / w^(1 - r)`` of its mean input magnitude x and, in half of the trials, the mean of its
weights' magnitudes relative to their group; r is searched. The paper's way compares the outputs of whole blocks, run
again for every trial; here a trial costs one product with a sketch of the inputs, and the best one is kept only if it
lowers the error over all tokens that were gathered. Query heads that share a key head share the scales of its values,
so that the output projection has scales under grouped attention, too. The range of every group of weights is then
narrowed where that lowers the error of its own outputs, under the same condition. With high effort weights are rounded
by GPTQ on top of it, if that is better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.config.quantization import Storage
from lmdeploy.lite.recipe import Effort, Fitted, Need, Recipe, Site, SiteName, SiteReport, SiteStatistics
from lmdeploy.lite.rotated import GPTQ
from lmdeploy.lite.rounding import bundle_of, codes_of, make_grid, output_loss, rounded, sketch

WIDTH = 256  # columns of a sketch
ROWS = 512  # of a weight, about, on which scales are tried
RATIOS = tuple(i / 10 for i in range(1, 10))
STEPS: dict[Effort, tuple[float, ...]] = {'fast': (), 'normal': (0.05, 0.025), 'high': (0.05, 0.025, 0.0125)}
SHRINKS: dict[Effort, tuple[float, ...]] = {
    'fast': (), 'normal': (0.95, 0.9, 0.85, 0.8, 0.7), 'high': tuple(1 - i / 20 for i in range(1, 11))}  # fmt: skip
CLIPPED = ('v', 'o', 'gate', 'up', 'down')  # queries and keys meet in a product, where outliers matter


@dataclass(slots=True)
class AWQ(Recipe):
    """The recipe.

    Args:
        form: how all linears are stored.
        search: search r; otherwise the published smoothing of LMDeploy, r = 0.5 by the largest inputs.
        smooth: scale at all; otherwise weights are only rounded.
    """

    form: Storage
    effort: Effort = 'normal'
    search: bool = True
    smooth: bool = True
    name: str = 'awq'

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({'sample', 'hessian'} if self.effort == 'high' else {'sample'})

    def key(self) -> dict[str, object]:
        return {'recipe': self.name, 'storage': str(self.form), 'effort': self.effort, 'search': self.search,
                'smooth': self.smooth}  # fmt: skip

    def storage(self, layer: int, site: SiteName) -> Storage:
        return self.form

    def scale(self, site: Site, statistics: SiteStatistics) -> Tensor | None:
        if not self.smooth:
            return None
        weight = site.weight
        share = _share(weight, self.form)
        if not self.search:
            site.notes['baseline'] = self._plain_loss(weight, statistics)
            return _scale(site, statistics.absmax, share, 0.5, 0.5)
        assert statistics.sample is not None
        inputs = sketch(statistics.sample, WIDTH, site.layer)
        some = weight[:: max(1, len(weight) // ROWS)]

        def trial(ratio: float, duo: bool) -> tuple[float, Tensor]:
            scale = _scale(site, statistics.absmean, share, ratio, 1 - ratio if duo else 0.0)
            return self._error(some, scale[site.tie], inputs), scale

        best, kept, at = self._error(some, torch.ones_like(statistics.absmean), inputs), None, (0.0, True)
        for duo in (True, False):
            for ratio in RATIOS:
                error, scale = trial(ratio, duo)
                if error < best:
                    best, kept, at = error, scale, (ratio, duo)
        for step in STEPS[self.effort] if kept is not None else ():
            centre, duo = at
            for ratio in (centre - step, centre + step):
                error, scale = trial(ratio, duo)
                if error < best:
                    best, kept, at = error, scale, (ratio, duo)
        if kept is None:
            return None
        spread = kept[site.tie]
        after = rounded(weight * spread, self.form) / spread
        baseline = self._plain_loss(weight, statistics)
        site.notes['baseline'] = baseline
        if output_loss(after - weight, weight, statistics) >= baseline:
            return None
        site.notes |= {'ratio': round(at[0], 4), 'weights': at[1]}
        return kept

    def fit(self, site: Site, statistics: SiteStatistics) -> Fitted:
        weight = site.weight
        loss = baseline = self._plain_loss(weight, statistics)
        shrink = self._ranges(site, statistics) if self.smooth and self.search else None
        if shrink is not None:
            loss = output_loss(rounded(weight, self.form, shrink) - weight, weight, statistics)
            if loss >= baseline:
                loss, shrink = baseline, None
        bundles, start = {}, 0
        for linear in site.linears:
            part = slice(start, start + linear.weight.shape[0])
            grid = make_grid(linear.weight, self.form, None if shrink is None else shrink[part])
            bundles[linear.role] = bundle_of(codes_of(linear.weight, grid), grid)
            start = part.stop
        if shrink is not None:
            site.notes['narrowed'] = round(float((shrink < 1).float().mean()), 3)
        if self.effort == 'high':
            other = GPTQ(self.form).fit(site, statistics)
            if other.report.loss < loss:
                loss, bundles = other.report.loss, other.bundles
                site.notes['rounding'] = 'gptq'
        return Fitted(bundles, SiteReport(loss, float(site.notes.pop('baseline', baseline)), site.notes))

    def _plain_loss(self, weight: Tensor, statistics: SiteStatistics) -> float:
        return output_loss(rounded(weight, self.form) - weight, weight, statistics)

    def _error(self, weight: Tensor, spread: Tensor, inputs: Tensor) -> float:
        return float(((rounded(weight * spread, self.form) / spread - weight) @ inputs).square_().sum())

    def _ranges(self, site: Site, statistics: SiteStatistics) -> Tensor | None:
        """``[out, groups]``: by how much the range of every group is narrowed; None where nothing is tried."""
        shrinks = SHRINKS[self.effort]
        if not shrinks:
            return None
        assert statistics.sample is not None
        weight, group = site.weight, self.form.group or site.in_features
        rows = torch.cat([torch.full((linear.weight.shape[0], 1), linear.role in CLIPPED) for linear in site.linears])
        inputs = sketch(statistics.sample, WIDTH, site.layer).unflatten(0, (-1, group))  # [groups, group, width]

        def errors(shrink: float) -> Tensor:
            full = torch.full((weight.shape[0], len(inputs)), shrink, device=weight.device)
            delta = (rounded(weight, self.form, full) - weight).unflatten(1, (-1, group)).transpose(0, 1)
            return torch.bmm(delta, inputs).square().sum(2).t()  # [out, groups]

        best, chosen = errors(1.0), torch.ones(weight.shape[0], len(inputs), device=weight.device)
        for shrink in shrinks:
            found = errors(shrink)
            better = (found < best) & rows.to(weight.device)
            best, chosen = torch.where(better, found, best), torch.where(better, shrink, chosen)
        return chosen


def _share(weight: Tensor, storage: Storage) -> Tensor:
    """``[in]``: the mean over rows of a weight's magnitude relative to the largest of its group."""
    groups = weight.abs().unflatten(1, (-1, storage.group or weight.shape[1]))
    return (groups / groups.amax(2, keepdim=True).clamp(min=1e-12)).flatten(1).mean(0)


def _scale(site: Site, magnitude: Tensor, share: Tensor, ratio: float, against: float) -> Tensor:
    """``[channels]``: ``magnitude^ratio / share^against``, normalised so that its extremes are each other's inverse."""
    scale = site.gather(magnitude).clamp(min=1e-4) ** ratio
    if against:
        scale = scale / (site.gather(share) ** against + 1e-4)
    scale = scale.clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()

"""SmoothQuant (Xiao et al. 2022): weights and inputs in 8 bits, with the inputs' outliers moved into the weights.

``s = max|x|^alpha / max|w|^(1 - alpha)``; alpha is searched for every site by the error of its outputs on real tokens,
with inputs and weights rounded as the kernels round them, and scales are kept only if that error falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.config.quantization import Storage
from lmdeploy.lite.recipe import Effort, Fitted, Need, Recipe, Site, SiteName, SiteReport, SiteStatistics
from lmdeploy.lite.rounding import bundle_of, codes_of, make_grid, rounded
from lmdeploy.ops.quantize import quantize_tokens

ALPHAS: dict[Effort, tuple[float, ...]] = {
    'fast': (0.5, 0.7, 0.85), 'normal': (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    'high': (0.0, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)}  # fmt: skip
TRIAL: dict[Effort, int] = {'fast': 256, 'normal': 512, 'high': 2048}  # tokens of a trial


@dataclass(slots=True)
class SmoothQuant(Recipe):
    """The recipe.

    Args:
        form: how all linears are stored; it quantises inputs token by token.
        search: search alpha; float8 needs no scales, which do not change relative errors.
    """

    form: Storage
    effort: Effort = 'normal'
    search: bool = True
    name: str = 'smooth_quant'
    needs: frozenset[Need] = frozenset({'sample'})

    def key(self) -> dict[str, object]:
        return {'recipe': self.name, 'storage': str(self.form), 'effort': self.effort, 'search': self.search}

    def storage(self, layer: int, site: SiteName) -> Storage:
        return self.form

    def scale(self, site: Site, statistics: SiteStatistics) -> Tensor | None:
        if not self.search:
            return None
        assert statistics.sample is not None
        weight, sample = site.weight, statistics.sample
        trial = sample[:: max(1, len(sample) // TRIAL[self.effort])]
        most, least = site.gather(statistics.absmax).clamp(min=1e-5), site.gather(weight.abs().amax(0)).clamp(min=1e-5)
        exact = trial @ weight.t()
        best, kept = self._loss(trial, exact, weight, None), None
        for alpha in ALPHAS[self.effort]:
            scale = most**alpha / least ** (1 - alpha)
            scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)
            loss = self._loss(trial, exact, weight, scale[site.tie])
            if loss < best:
                best, kept, chosen = loss, scale, alpha
        exact = sample @ weight.t()
        baseline = self._loss(sample, exact, weight, None)
        site.notes['baseline'] = baseline
        if kept is None or self._loss(sample, exact, weight, kept[site.tie]) >= baseline:
            return None
        site.notes['alpha'] = chosen
        return kept

    def fit(self, site: Site, statistics: SiteStatistics) -> Fitted:
        assert statistics.sample is not None
        loss = self._loss(statistics.sample, statistics.sample @ site.weight.t(), site.weight, None)
        bundles = {}
        for linear in site.linears:
            grid = make_grid(linear.weight, self.form)
            bundles[linear.role] = bundle_of(codes_of(linear.weight, grid), grid)
        return Fitted(bundles, SiteReport(loss, float(site.notes.pop('baseline', loss)), site.notes))

    def _loss(self, x: Tensor, exact: Tensor, weight: Tensor, spread: Tensor | None) -> float:
        """The relative error of ``exact = x weightT`` with both rounded, after ``spread [in]`` has moved."""
        inputs, weights = (x, weight) if spread is None else (x / spread, weight * spread)
        codes, scales = quantize_tokens.reference(inputs, self.form.activation, 0)
        error = (codes.float() * scales) @ rounded(weights, self.form).t() - exact
        energy = exact.square().sum(dtype=torch.float64).clamp(min=1e-30)
        return float(error.square().sum(dtype=torch.float64) / energy)

"""Block-wise tuning: roundings and scales of a whole layer, so that the layer's outputs come right together.

GPTQ looks at one site at a time; here the layer is run on the calibration tokens and compared with what its unquantised
weights give. Every weight has an offset that can push it over to the neighbouring code, and every group a factor of its
scale; signs of gradients move them by ever smaller steps. What comes out is taken only if the layer's error over all
tokens falls.

Source: Cheng et al., SignRound (arXiv 2309.05516).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmdeploy.config.quantization import hadamard_block
from lmdeploy.lite.grid import Grid, Levels
from lmdeploy.lite.recipe import Block
from lmdeploy.ops.hadamard import hadamard
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.transform import plain_weight

STEPS = 120
REACH = 0.5  # codes that an offset can move a weight by, in all steps together
SCALE_REACH = 0.04  # part of a scale, likewise
INSIDE = 0.49  # how far from its code a weight starts at most: nothing changes before the first step


@dataclass(slots=True)
class _Tuned:
    """One linear's bundle with what is learnt of it: ``offset [in, out]``, ``factor [groups, out]``, float32.

    Attributes:
        start: ``[in, out]``: where weights lie between the codes, less zero points.
    """

    bundle: LinearBundle
    grid: Grid
    start: Tensor
    offset: Tensor
    factor: Tensor

    @staticmethod
    def of(bundle: LinearBundle, weight: Tensor) -> _Tuned:
        """Args: weight: ``[out, in]``, what was quantised."""
        assert bundle.codes is not None and bundle.scales is not None
        scheme = bundle.scheme
        grid = Grid(scheme.bits, scheme.group, scheme.symmetric, 0, bundle.scales.dtype)
        levels = Levels(bundle.scales, bundle.zeros)
        steps = levels.steps(bundle.codes, grid)
        exact = _turned(weight, bundle.input_transform).t() / _spread(bundle.scales.float(), len(steps), grid)
        start = steps + (exact - steps).clamp_(-INSIDE, INSIDE)
        return _Tuned(bundle, grid, start, torch.zeros_like(start).requires_grad_(),
                      torch.zeros_like(bundle.scales, dtype=torch.float32).requires_grad_())  # fmt: skip

    def within(self, steps: Tensor) -> Tensor:
        """``steps [in, out]``, codes less zero points, cut off at the extreme codes."""
        if self.bundle.zeros is None:
            return steps.clamp(self.grid.low, self.grid.high)
        zeros = _spread(self.bundle.zeros.float(), len(steps), self.grid)
        return torch.clamp(steps, self.grid.low - zeros, self.grid.high - zeros)

    def weight(self) -> Tensor:
        """``[out, in]``, as plain inputs see it; gradients pass the rounding as if it were not there."""
        moved = self.start + self.offset
        steps = self.within(moved + (moved.round() - moved).detach())
        assert self.bundle.scales is not None
        scales = self.bundle.scales.float() * (1 + self.factor)
        return _turned((steps * _spread(scales, len(steps), self.grid)).t(), self.bundle.input_transform)

    @torch.no_grad()
    def result(self) -> LinearBundle:
        """The bundle that it has become."""
        steps = self.within((self.start + self.offset).round())
        assert self.bundle.scales is not None and self.bundle.codes is not None
        if self.bundle.zeros is not None:
            steps += _spread(self.bundle.zeros.float(), len(steps), self.grid)
        scales = self.grid.storable(self.bundle.scales.float() * (1 + self.factor))
        return replace(self.bundle, codes=steps.to(self.bundle.codes.dtype), scales=scales)


def tune(block: Block, steps: int = STEPS) -> float:
    """Improve ``block.fitted`` in place.

    Returns:
        The layer's error, relative to what it was; 1: nothing was better.
    """
    fitted = {role: bundle for site in block.fitted.values() for role, bundle in site.bundles.items()}
    tuned = {role: _Tuned.of(bundle, block.weights.linears[role].weight) for role, bundle in fitted.items()}
    before = error(block, {role: plain_weight(bundle) for role, bundle in fitted.items()})
    pieces = _endless(block)
    for step in range(steps if before else 0):
        x, y = next(pieces)
        weights = _all(block, {role: one.weight() for role, one in tuned.items()})
        loss = (block.forward(x.float(), weights) - y).square().mean()
        loss.backward()
        pace = 2 * (1 - step / steps) / steps  # so that all steps in one direction make 1
        with torch.no_grad():
            for one in tuned.values():
                for value, reach in ((one.offset, REACH), (one.factor, SCALE_REACH)):
                    assert value.grad is not None
                    value -= pace * reach * value.grad.sign()
                    value.grad = None
    result = {role: one.result() for role, one in tuned.items()}
    after = error(block, {role: plain_weight(bundle) for role, bundle in result.items()})
    if not after < before:
        return 1.0
    for site in block.fitted.values():
        site.bundles = {role: result[role] for role in site.bundles}
    return after / before


@torch.no_grad()
def error(block: Block, weights: dict[str, Tensor]) -> float:
    """Mean square difference of the layer's outputs from those wanted, with these dense weights by role."""
    total = count = 0.0
    for x, y in block.pieces():
        total += float((block.forward(x.float(), _all(block, weights)) - y).square().sum(dtype=torch.float64))
        count += y.numel()
    return total / max(count, 1.0)


def _endless(block: Block) -> Iterator[tuple[Tensor, Tensor]]:
    while True:  # not kept: there may be more than memory holds
        yield from block.pieces()


def _all(block: Block, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With those of linears that stay dense."""
    return {role: linear.weight for role, linear in block.weights.linears.items()} | weights


def _turned(weight: Tensor, name: str) -> Tensor:
    """``weight [out, in]`` with its channels transformed; differentiable on every device."""
    return hadamard.reference(weight, hadamard_block(name)) if name else weight


def _spread(values: Tensor, channels: int, grid: Grid) -> Tensor:
    """``[groups, out]`` to ``[in, out]``."""
    return values.repeat_interleave(grid.group or channels, 0)[:channels]

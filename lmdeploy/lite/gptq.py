"""GPTQ: codes chosen one input channel after another, later channels making up for the errors of earlier ones.

Everything minimises one number, the error of a layer's outputs over the calibration tokens: for a weight W, its
quantised form W' and H, the mean of ``x xT`` over the layer's inputs,

    loss = tr((W' - W) H (W' - W)^T) = E|W'x - Wx|^2,

which is a sum over output channels. So outputs are independent of each other given H: all linears that share their
inputs are quantised side by side, and whatever is tried beyond the plain algorithm is accepted for each output channel
alone, where it lowers that channel's loss.

Sources: Frantar et al., GPTQ (arXiv 2210.17323); the order of channels is *static*: groups get their scales before any
channel is rounded, so no order has to be stored. Behdin et al., QuantEase (arXiv 2309.01885), for coordinate descent.

Weights lie here as files and kernels have them: ``[in, out]``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lmdeploy.errors import LoadError
from lmdeploy.lite.grid import Grid, Levels, extremes, search
from lmdeploy.ops.round_columns import round_columns

BLOCK = 128
DAMPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # parts of the mean of H's diagonal, tried in turn
ENOUGH = 1e-3  # a pass that lowers the loss by less than this part was the last


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is tried.

    Attributes:
        searched: scales and zero points that minimise a weighted error are tried beside the extremes.
        refits: rounds of least squares for the scales, each followed by GPTQ on them.
        descents: at most so many passes of coordinate descent over the codes.
    """

    searched: bool = True
    refits: int = 1
    descents: int = 2


PLAIN = Effort(searched=False, refits=0, descents=0)
EFFORTS = {'fast': PLAIN, 'normal': Effort(), 'high': Effort(True, 3, 6)}


@dataclass(slots=True)
class Factor:
    """What GPTQ needs of a Hessian, for every weight that is multiplied by the same inputs.

    Attributes:
        order: ``[in] int64``, the channels as they are rounded.
        mixing: ``[in, in] float32`` in that order, read above the diagonal: how a change of channel j moves channel
            k > j.
        weights: ``[in] float32`` in the channels' own order: ``1 / [H^-1]_jj``, what a change of channel j costs if all
            others make up for it.
        damp: the part of the mean of the diagonal that was added to it.
    """

    order: Tensor
    mixing: Tensor
    weights: Tensor
    damp: float


def damped(hessian: Tensor, part: float) -> Tensor:
    """``hessian [in, in]`` with a part of the mean of its diagonal added to it; channels without any input get 1."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else diagonal.new_ones(())
    diagonal.masked_fill_(~live, 1.0)
    diagonal.add_(part * mean)
    return damped


def factorise(hessian: Tensor, part: float = DAMPS[0]) -> Factor:
    """Prepare ``hessian [in, in] float32``.

    With H reversed = L L^T and U = (L reversed)^-1, U is upper triangular and ``U^T U = H^-1``: one factorisation and
    one triangular solve, in place of an inverse and its factorisation.

    Args:
        part: the least damping; more is added until H is positive definite.

    Raises:
        LoadError: LMD-630: H has values that are not finite, or no damping makes it positive definite.
    """
    picked = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    finite = bool(torch.isfinite(hessian.diagonal()).all())
    for damp in (part, *(more for more in DAMPS if more > part)) if finite else ():
        reversed_ = damped(hessian, damp)[picked.flip(0)][:, picked.flip(0)]
        lower, info = torch.linalg.cholesky_ex(reversed_)
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            break
    else:
        raise LoadError('LMD-630', damp=DAMPS[-1])
    del reversed_
    upper = lower.flip(0, 1)
    del lower
    upper = torch.linalg.solve_triangular(upper, torch.eye(len(upper), device=upper.device), upper=True)
    weights = torch.empty_like(hessian.diagonal())
    weights[picked] = upper.square().sum(0).reciprocal_()
    return Factor(picked, upper.div_(upper.diagonal().clone()[:, None]), weights, damp)


def gptq(weight: Tensor, factor: Factor, grid: Grid, levels: Levels) -> Tensor:
    """The codes ``[in, out] int16`` of ``weight [in, out] float32`` on given scales and zero points."""
    codes = torch.empty(weight.shape, dtype=torch.int16, device=weight.device)
    rest = weight[factor.order]
    for start in range(0, len(weight), BLOCK):
        end = min(start + BLOCK, len(weight))
        channels = factor.order[start:end]
        scales, zeros = levels.of(channels, grid)
        codes[channels], change = round_columns(rest[start:end], factor.mixing[start:end, start:end], scales, zeros,
                                                grid.low, grid.high, None)  # fmt: skip
        if end < len(weight):
            rest[end:].addmm_(factor.mixing[start:end, end:].t(), change)
    return codes


def descend(weight: Tensor, codes: Tensor, hessian: Tensor, grid: Grid, levels: Levels) -> Tensor:
    """One pass of coordinate descent: every code in turn becomes the best one, all others being what they are.

    The loss of no output rises, but for rounding of sums.

    Args:
        weight: ``[in, out] float32``. codes: ``[in, out] int16``. hessian: ``[in, in] float32``, damped.
    """
    codes = codes.clone()
    error = weight - levels.values(codes, grid)
    diagonal = hessian.diagonal()
    for start in range(0, len(weight), BLOCK):
        end = min(start + BLOCK, len(weight))
        channels = torch.arange(start, end, device=weight.device)
        scales, zeros = levels.of(channels, grid)
        held = weight[start:end] - error[start:end]
        targets = (hessian[start:end] @ error).div_(diagonal[start:end, None]).add_(held)
        mixing = hessian[start:end, start:end] / -diagonal[start:end]
        codes[start:end], change = round_columns(targets, mixing, scales, zeros, grid.low, grid.high, held)
        error[start:end] -= change
    return codes


def refit(weight: Tensor, codes: Tensor, hessian: Tensor, grid: Grid, levels: Levels) -> Levels:
    """The scales that minimise the loss of these codes and zero points: least squares, output by output.

    Args:
        weight: ``[in, out] float32``. codes: ``[in, out] int16``. hessian: ``[in, in] float32``, damped.
    """
    steps = levels.steps(codes, grid)  # [in, out]
    groups, outputs = levels.scales.shape
    size = grid.group or len(weight)
    normal = weight.new_empty(outputs, groups, groups)
    wanted = weight.new_empty(outputs, groups)
    aimed = hessian @ weight
    for g, start in enumerate(range(0, len(weight), size)):
        part = slice(start, start + size)
        wanted[:, g] = (steps[part] * aimed[part]).sum(0)
        carried = (hessian[: part.stop, part] @ steps[part]).mul_(steps[: part.stop])
        for other, at in enumerate(range(0, part.stop, size)):
            normal[:, g, other] = carried[at : at + size].sum(0)
            normal[:, other, g] = normal[:, g, other]
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    solved, info = torch.linalg.solve_ex(normal, wanted)
    fine = (info == 0) & torch.isfinite(solved).all(1) & (solved.abs() > torch.finfo(torch.float16).tiny).all(1)
    scales = torch.where(fine[:, None], solved, levels.scales.t().float()).t().contiguous()
    return replace(levels, scales=grid.storable(scales))


@dataclass(slots=True)
class Rounded:
    """A quantised weight.

    Attributes:
        codes: ``[in, out] int16``. loss: ``[out] float32``, of each output.
        baseline: the same of rounding to the nearest with the extremes as scales; None: not known.
        accepted: what part of the outputs took each attempt.
    """

    codes: Tensor
    levels: Levels
    loss: Tensor
    baseline: Tensor | None = None
    accepted: dict[str, float] = field(default_factory=dict)


def losses(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """``[out] float32``: the loss of each output, for ``weight`` and ``values [in, out]``."""
    delta = values - weight
    return (hessian @ delta).mul_(delta).sum(0)


def quantise(weight: Tensor, hessian: Tensor, grid: Grid, effort: Effort = PLAIN, part: float = DAMPS[0]) -> Rounded:
    """Quantise ``weight [in, out] float32`` for inputs with ``hessian [in, in] float32``.

    Raises:
        LoadError: LMD-630, as :func:`factorise`.
    """
    nearest = extremes(weight, grid)
    baseline = losses(weight, nearest.values(nearest.nearest(weight, grid), grid), hessian)
    factor = factorise(hessian, part)
    best = _rounded(weight, gptq(weight, factor, grid, nearest), nearest, hessian, grid)
    accepted: dict[str, float] = {}

    def attempt(name: str, codes: Tensor, levels: Levels) -> None:
        nonlocal best
        made = _rounded(weight, codes, levels, hessian, grid)
        lower = made.loss < best.loss
        best = Rounded(torch.where(lower, codes, best.codes), levels.where(lower, best.levels),
                       torch.where(lower, made.loss, best.loss))  # fmt: skip
        accepted[name] = float(lower.float().mean())

    if effort.searched:
        levels = search(weight, grid, factor.weights)
        attempt('searched scales', gptq(weight, factor, grid, levels), levels)
    smooth = damped(hessian, factor.damp) if effort.refits or effort.descents else hessian
    for i in range(effort.refits):
        levels = refit(weight, best.codes, smooth, grid, best.levels)
        attempt(f'least squares {i + 1}', best.codes, levels)
        attempt(f'rounded again {i + 1}', gptq(weight, factor, grid, levels), levels)
    del factor
    before = float(best.loss.sum())
    for i in range(effort.descents):
        attempt(f'descent {i + 1}', descend(weight, best.codes, smooth, grid, best.levels), best.levels)
        now = float(best.loss.sum())
        if before - now <= ENOUGH * before:
            break
        before = now
    best.baseline, best.accepted = baseline, accepted
    return best


def _rounded(weight: Tensor, codes: Tensor, levels: Levels, hessian: Tensor, grid: Grid) -> Rounded:
    return Rounded(codes, levels, losses(weight, levels.values(codes, grid), hessian))

"""GPTQ's laws: it never does worse than rounding, attempts only help, outputs are independent of each other."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.config.quantization import Storage
from lmdeploy.errors import LoadError
from lmdeploy.lite import gptq
from lmdeploy.lite.grid import Grid, Levels, bundle_of, extremes, search
from lmdeploy.quant.dequant import dequantize_bundle
from lmdeploy.quant.rounding import round_weight

IN, OUT = 192, 40
GRIDS = [Grid(4, 64, False), Grid(4, 64, True), Grid(3, 64, False), Grid(2, 32, False), Grid(2, 32, True),
         Grid(8, 0, True, scale_dtype=torch.float32), Grid(4, 48, False, least_zero=1), Grid(4, 80, False)]  # fmt: skip
IDS = [f'{g.bits} bits, {g.group}, {"sym" if g.symmetric else "asym"}' for g in GRIDS]


def weight(outputs: int = OUT, seed: int = 0) -> torch.Tensor:
    return torch.randn(IN, outputs, generator=torch.Generator().manual_seed(seed)) * 0.02


def inputs(tokens: int = 1024, seed: int = 1) -> torch.Tensor:
    """Correlated channels of very different sizes, with means."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, IN, generator=random) @ torch.randn(IN, IN, generator=random) / IN**0.5
    return (mixed + torch.randn(IN, generator=random)) * (3 * torch.rand(IN, generator=random)).exp()


def hessian(x: torch.Tensor) -> torch.Tensor:
    return x.t() @ x / len(x)


def loss(w: torch.Tensor, codes: torch.Tensor, levels: Levels, grid: Grid, x: torch.Tensor) -> torch.Tensor:
    """By definition: ``E|W'x - Wx|^2`` of every output."""
    return (x.double() @ (levels.values(codes, grid) - w).double()).square().mean(0)


@pytest.mark.parametrize('grid', GRIDS, ids=IDS)
def test_less_is_lost_than_by_rounding(grid):
    w, x = weight(), inputs()
    h = hessian(x)
    made = {name: gptq.quantise(w, h, grid, effort) for name, effort in gptq.EFFORTS.items()}
    for one in made.values():
        assert one.codes.min() >= grid.low and one.codes.max() <= grid.high
        assert one.levels.scales.dtype is grid.scale_dtype and bool((one.levels.scales != 0).all())
        assert one.levels.zeros is None or (
            one.levels.zeros.min() >= grid.least_zero and one.levels.zeros.max() <= grid.high)
        torch.testing.assert_close(one.loss.double(), loss(w, one.codes, one.levels, grid, x), rtol=0.02, atol=1e-9)
    nearest = extremes(w, grid)
    baseline = loss(w, nearest.nearest(w, grid), nearest, grid, x).sum()
    assert made['fast'].loss.sum() < 0.75 * baseline
    assert bool((made['normal'].loss <= made['fast'].loss).all())  # every output for itself
    assert made['high'].loss.sum() <= 1.001 * made['normal'].loss.sum()
    assert made['normal'].loss.sum() < (0.93 if grid.bits < 8 else 1.0) * made['fast'].loss.sum()


def test_the_loop_is_gptq_by_definition():
    """Against the textbook: after each channel the rest is solved anew by least squares."""
    grid, w, h = Grid(3, 0, False), weight(3)[:24], hessian(inputs())[:24, :24].double()
    levels = extremes(w, grid)
    factor = gptq.factorise(h.float(), 0.01)
    damped, order = gptq.damped(h.float(), 0.01).double(), factor.order.tolist()
    wanted, rest, left = torch.zeros(24, 3, dtype=torch.int16), w.double().clone(), list(order)
    scales, zeros = levels.scales[0].double(), levels.zeros[0].double()
    for channel in order:
        left.remove(channel)
        code = (rest[channel] / scales).round().add(zeros).clamp(grid.low, grid.high)
        wanted[channel] = code.short()
        change = (code - zeros) * scales - rest[channel]
        if left:  # the others minimise the loss given this channel's change
            inverse = torch.linalg.inv(damped[left][:, left])
            rest[left] -= inverse @ damped[left][:, [channel]] * change
    assert torch.equal(gptq.gptq(w, factor, grid, levels), wanted)


def test_the_factor():
    h = hessian(inputs())
    factor = gptq.factorise(h, 0.01)
    assert torch.equal(factor.order.sort().values, torch.arange(IN))
    diagonal = h.diagonal()[factor.order]
    assert bool((diagonal[:-1] >= diagonal[1:]).all())
    inverse = torch.linalg.inv(gptq.damped(h, 0.01).double())
    torch.testing.assert_close(factor.weights.double(), 1 / inverse.diagonal(), rtol=1e-3, atol=0)


def test_more_damping_where_it_takes_it():
    x = inputs(8)  # fewer tokens than channels
    assert gptq.factorise(hessian(x), 1e-12).damp >= 1e-12
    made = gptq.quantise(weight(), hessian(x), GRIDS[0], gptq.EFFORTS['normal'])
    assert bool(torch.isfinite(made.loss).all())


def test_values_that_are_not_finite_are_an_error():
    h = hessian(inputs())
    h[3, 3] = float('nan')
    with pytest.raises(LoadError) as caught:
        gptq.factorise(h)
    assert caught.value.code == 'LMD-630' and caught.value.text('zh')


def test_dead_channels_are_rounded_and_disturb_nobody():
    x = inputs()
    x[:, [5, 70]] = 0
    grid, w = GRIDS[0], weight()
    made = gptq.quantise(w, hessian(x), grid, gptq.EFFORTS['normal'])
    scales, zeros = made.levels.of(torch.tensor([5, 70]), grid)
    assert bool(((made.levels.values(made.codes, grid) - w)[[5, 70]].abs()
                 <= torch.maximum(scales * 0.51, scales * (zeros - 7.5).abs())).all())  # fmt: skip
    assert made.loss.sum() < 0.75 * made.baseline.sum()


@pytest.mark.parametrize('effort', ['fast', 'normal'])
def test_side_by_side_is_one_by_one(effort):
    h, grid = hessian(inputs()), Grid(4, 64, False)
    first, second = weight(24, 2), weight(16, 3)
    both = gptq.quantise(torch.cat([first, second], 1), h, grid, gptq.EFFORTS[effort])
    alone = [gptq.quantise(w, h, grid, gptq.EFFORTS[effort]) for w in (first, second)]
    same = (both.codes == torch.cat([one.codes for one in alone], 1)).float().mean()
    assert same > 0.995  # but for ties, which sums in another order decide
    torch.testing.assert_close(both.loss, torch.cat([one.loss for one in alone]), rtol=0.02, atol=1e-9)


def test_the_same_again_bit_by_bit():
    h, w = hessian(inputs()), weight()
    first, second = (gptq.quantise(w.clone(), h.clone(), GRIDS[3], gptq.EFFORTS['high']) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.levels.scales, second.levels.scales)


@pytest.mark.parametrize('grid', GRIDS, ids=IDS)
def test_least_squares_and_descent_only_lower_the_loss(grid):
    w, h = weight(), gptq.damped(hessian(inputs()), 0.01)
    levels = extremes(w, grid)
    codes = levels.nearest(w, grid)
    before = gptq.losses(w, levels.values(codes, grid), h)
    fitted = gptq.refit(w, codes, h, grid, levels)
    after = gptq.losses(w, fitted.values(codes, grid), h)
    assert after.sum() < before.sum()
    assert bool((after <= before * (1 + (0.02 if grid.scale_dtype is torch.float16 else 1e-3))).all())
    moved = gptq.descend(w, codes, h, grid, levels)
    assert bool((gptq.losses(w, levels.values(moved, grid), h) <= before * (1 + 1e-4)).all())


@pytest.mark.parametrize('grid', [g for g in GRIDS if g.bits < 8], ids=[i for i, g in zip(IDS, GRIDS) if g.bits < 8])
def test_searched_scales_lose_less_by_their_own_measure(grid):
    w, importance = weight(), torch.rand(IN, generator=torch.Generator().manual_seed(5)) + 0.1

    def error(levels: Levels) -> torch.Tensor:
        return ((levels.values(levels.nearest(w, grid), grid) - w).square() * importance[:, None]).sum(0)

    found, plain = search(w, grid, importance), extremes(w, grid)
    assert error(found).sum() < (0.97 if grid.bits > 2 else 0.7) * error(plain).sum()
    assert bool((error(found) <= error(plain) * 1.02).all())


@pytest.mark.parametrize('storage', [
    Storage('pack-quantized', bits=4, group=64, symmetric=False), Storage('pack-quantized', bits=2, group=64),
    Storage('int-quantized', activation='int8'), Storage('gptq', bits=4, group=64, symmetric=False, zero_shift=1),
], ids=str)  # fmt: skip
def test_bundles_stand_for_the_levels_and_extremes_are_plain_rounding(storage):
    grid = Grid.of(storage, torch.float32)
    w = weight()
    levels = extremes(w, grid)
    codes = levels.nearest(w, grid)
    bundle, plain = bundle_of(codes, levels, storage), round_weight(w.t().contiguous(), storage)
    torch.testing.assert_close(dequantize_bundle(bundle, torch.float32), levels.values(codes, grid).t())
    torch.testing.assert_close(bundle.scales, plain.scales, rtol=1e-6, atol=0)
    assert (bundle.codes == plain.codes).float().mean() > 0.999


def test_grids_are_of_integers():
    with pytest.raises(ValueError, match='no grid'):
        Grid.of(Storage('float-quantized', 'float8_e4m3fn'), torch.float32)

"""GPTQ on integer grids, with or without rotations: 4, 3 and 2 bits, 8-bit inputs, files for everybody or for us."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lmdeploy.config.quantization import FLOAT, INT, PACK, Storage, hadamard_block, hadamard_name
from lmdeploy.errors import ConfigError
from lmdeploy.lite import gptq
from lmdeploy.lite.grid import Grid, bundle_of
from lmdeploy.lite.recipe import (
    Block,
    Effort,
    Fitted,
    LayerWeights,
    Need,
    Recipe,
    Site,
    SiteName,
    SiteReport,
    SiteStatistics,
    TopWeights,
)
from lmdeploy.lite.rotate import R2_SEED, SEED, orthogonal, rotate_stream, rotate_top, rotate_values
from lmdeploy.lite.tune import tune
from lmdeploy.models.spec import DecoderSpec
from lmdeploy.quant.transform import transform

Rotation = Literal['none', 'portable', 'native']
COMPRESSED_FORMATS = (PACK, INT, FLOAT)
BLOCKS = (128, 64, 32, 16)
CORRECTION = 0.5  # part of the error of earlier layers that a layer makes up for: all of it would fit these tokens only


@dataclass(slots=True)
class GPTQ(Recipe):
    """The recipe.

    Args:
        form: how all linears are stored.
        rotation: ``'none'``; ``'portable'``: R1 and R2, folded into the weights; ``'native'``: R2, and a block Hadamard
            transform of the other inputs while the model runs, which compressed-tensors files can say.
        damp: the least part of the mean of H's diagonal that is added to it.
        blocks: names of the transforms by width of inputs; known when the model is.
    """

    form: Storage
    rotation: Rotation = 'none'
    effort: Effort = 'normal'
    damp: float = 0.01
    name: str = 'gptq'
    blocks: dict[SiteName, str] = field(default_factory=dict)

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({'hessian', 'cross'} if self.effort == 'high' else {'hessian'})

    def key(self) -> dict[str, object]:
        return {'recipe': self.name, 'storage': str(self.form), 'rotation': self.rotation, 'effort': self.effort,
                'damp': self.damp}  # fmt: skip

    def prepare(self, spec: DecoderSpec) -> None:
        """As in the protocol.

        Raises:
            ConfigError: LMD-631, LMD-632: the model or the format does not allow the rotation.
        """
        config = spec.config
        if self.rotation == 'portable' and spec.post_norms:
            raise ConfigError('LMD-631', architecture=config.architecture)
        if self.rotation != 'native':
            return
        if self.form.format not in COMPRESSED_FORMATS:
            raise ConfigError('LMD-632', format=self.form.format)
        self.blocks = {'qkv': block_name(config.hidden_size), 'gate_up': block_name(config.hidden_size),
                       'down': block_name(config.intermediate_size)}  # fmt: skip

    def storage(self, layer: int, site: SiteName) -> Storage:
        return replace(self.form, transform=self.blocks.get(site, ''))

    def transform_top(self, top: TopWeights) -> None:
        if self.rotation == 'portable':
            rotate_top(top, orthogonal(top.embedding.shape[1], SEED))

    def transform(self, layer: LayerWeights) -> None:
        if self.rotation == 'portable':
            rotate_stream(layer, orthogonal(len(layer.norms['mlp']), SEED))
        if self.rotation != 'none':
            rotate_values(layer, orthogonal(layer.head_dim, R2_SEED))

    def fit(self, site: Site, statistics: SiteStatistics) -> Fitted:
        storage = self.storage(site.layer, site.name)
        grid = Grid.of(storage, scale_type(storage))
        weight, hessian, cross = turned(site, statistics, storage.transform)
        aim = weight if cross is None else corrected(weight, hessian, cross, self.damp)
        made = gptq.quantise(aim.t().contiguous(), hessian, grid, gptq.EFFORTS[self.effort], self.damp)
        energy = float(((weight @ hessian) * weight).sum(dtype=torch.float64))
        bundles, start = {}, 0
        for linear in site.linears:
            part = slice(start, start + linear.weight.shape[0])
            bundles[linear.role] = bundle_of(made.codes[:, part], made.levels.part(part), storage)
            start = part.stop
        assert made.baseline is not None
        loss, baseline = (float(part.sum(dtype=torch.float64)) / max(energy, 1e-30)
                          for part in (made.loss, made.baseline))  # fmt: skip
        choices = {name: round(part, 3) for name, part in made.accepted.items()}
        return Fitted(bundles, SiteReport(loss, baseline, {**site.notes, **choices}))

    def tune(self, block: Block) -> None:
        if self.effort != 'high':
            return
        rest = tune(block)
        for fitted in block.fitted.values():
            fitted.report.choices['tuned'] = round(rest, 3)


def block_name(width: int) -> str:
    """The transform of inputs of that width: blocks as large as divide it; ``''`` where that is less than 16."""
    return next((hadamard_name(block) for block in BLOCKS if width % block == 0), '')


def turned(site: Site, statistics: SiteStatistics, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, hessian and cross moments of a site behind the transform ``name``; the statistics are used up."""
    weight, hessian, cross = site.weight, statistics.hessian, statistics.cross
    statistics.hessian = statistics.cross = None  # the largest matrices there are
    assert hessian is not None
    if not name:
        return weight, hessian, cross
    return transform(weight, name), both_sides(hessian, name), None if cross is None else both_sides(cross, name)


def scale_type(storage: Storage) -> torch.dtype:
    """The type in which scales are stored: float16 for groups, float32 where there is one for a whole output."""
    return torch.float16 if storage.group else torch.float32


def both_sides(matrix: Tensor, name: str) -> Tensor:
    """``T matrix T^T``, T being the transform ``name``."""
    return transform(transform(matrix, name).t(), name).t().contiguous()


def corrected(weight: Tensor, hessian: Tensor, cross: Tensor, damp: float) -> Tensor:
    """The weight ``[out, in]`` whose outputs on inputs that earlier layers have spoiled are nearest to the right ones.

    With x the inputs as they are and x + d as they should be, ``E|W (x + d) - W'x|^2`` is, but for a constant, the loss
    of W' against ``W (1 + E[d xT] H^-1)``, the idea of GPTAQ (Li et al., arXiv 2504.02692). A part of it is taken.

    Args:
        cross: ``[in, in]``, the mean of ``d xT``.
    """
    lower = torch.linalg.cholesky_ex(gptq.damped(hessian, damp))[0]
    moved = torch.cholesky_solve(cross.t(), lower).t()
    aim = weight + CORRECTION * (weight @ moved)
    return aim if bool(torch.isfinite(aim).all()) else weight


def transform_config(targets: dict[str, list[str]]) -> dict[str, object]:
    """The ``transform_config`` of compressed-tensors.

    Args:
        targets: by name of a transform, the layers whose inputs it turns, as patterns.
    """
    groups = {}
    for i, (name, patterns) in enumerate(targets.items()):
        where = {'targets': patterns, 'ignore': []}
        groups[f'hadamard_{i}'] = {
            'type': 'hadamard', 'randomize': False, 'requires_grad': False, 'head_dim': hadamard_block(name),
            'precision': 'torch.float32',
            'apply': [where | {'location': 'weight_input', 'inverse': True},
                      where | {'location': 'input', 'inverse': False}]}  # fmt: skip
    return {'config_groups': groups}

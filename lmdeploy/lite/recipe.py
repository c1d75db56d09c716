"""The protocol between the layer-wise driver and the mathematics: what a recipe is given, and what it gives back.

The driver (:mod:`lmdeploy.lite.driver`) knows layers, files and statistics; a :class:`Recipe` knows how a weight is
quantised. For every decoder layer, in this order:

1. the layer's tensors are read as float32, and ``recipe.transform`` may rotate or fold them (it is also given the
   embedding, the final norm and the head, once);
2. one forward pass over the calibration tokens, with the outputs of the *quantised* layers before, gives the
   :class:`SiteStatistics` of all four sites;
3. ``recipe.scale(site, statistics)`` for down, o, gate_up, qkv: the driver folds what it returns into the producer of
   the site's inputs, its weights and its statistics;
4. ``recipe.fit(site, statistics)`` for qkv, o, gate_up, down;
5. ``recipe.tune(block)`` may change the fitted bundles, looking at the whole layer;
6. the layer is written, read back from the file as anybody would read it, and a second pass with what
   ``recipe.dense`` makes of that gives the next layer's inputs.

Everything is float32 on one device and must be deterministic: a resumed run repeats it bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lmdeploy.config.quantization import Storage
from lmdeploy.models.spec import DecoderSpec
from lmdeploy.ops.quantize import quantize_tokens
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.transform import plain_weight, transform

Effort = Literal['fast', 'normal', 'high']
SiteName = Literal['qkv', 'o', 'gate_up', 'down']
Need = Literal['hessian', 'sample', 'cross']
SITES: tuple[SiteName, ...] = ('qkv', 'o', 'gate_up', 'down')
ROLES: dict[SiteName, tuple[str, ...]] = {
    'qkv': ('q', 'k', 'v'), 'o': ('o',), 'gate_up': ('gate', 'up'), 'down': ('down',)}  # fmt: skip
SAMPLE = 2048  # tokens of a sample, if there are so many


@dataclass(slots=True)
class LinearWeights:
    """One linear layer: ``y = x @ weight.T + bias``.

    Attributes:
        role: ``q k v o gate up down``.
        name: its name below the checkpoint's layer, such as ``'self_attn.q_proj'``.
        weight: ``[out, in] float32``. bias: ``[out] float32``.
    """

    role: str
    name: str
    weight: Tensor
    bias: Tensor | None = None


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer, dense; transforms change it in place.

    Attributes:
        linears: by role.
        norms: ``[hidden] float32`` as they multiply (a stored difference from 1 is resolved), by role: ``attention mlp
            attention_post mlp_post q k``.
    """

    index: int
    linears: dict[str, LinearWeights]
    norms: dict[str, Tensor]
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(slots=True)
class TopWeights:
    """What is outside of the layers; ``head`` is a tensor of its own even where the model ties it to the embedding.

    Attributes:
        embedding, head: ``[vocab, hidden] float32``. norm: ``[hidden] float32``, as it multiplies.
        tied: head and embedding are still the same; a transform that makes them differ sets it to False.
    """

    embedding: Tensor
    norm: Tensor
    head: Tensor
    tied: bool


@dataclass(slots=True)
class Site:
    """The linears of one layer that share an input.

    Attributes:
        tie: ``[in] int64``: which channel of the producer's scale each input channel takes. The producer is the norm
            before (qkv, gate_up: all channels their own), v's outputs (o: query heads that share a key head share a
            scale) or up's outputs (down). Fold ``s [tie.max() + 1]``: producer / s, inputs' columns * s[tie].
        notes: what ``scale`` leaves for the report that ``fit`` makes: choices, and ``'baseline'``.
    """

    layer: int
    name: SiteName
    linears: tuple[LinearWeights, ...]
    tie: Tensor
    notes: dict[str, str | float | int | bool] = field(default_factory=dict)

    @property
    def in_features(self) -> int:
        return self.linears[0].weight.shape[1]

    @property
    def weight(self) -> Tensor:
        """``[sum of out, in]``: all weights below one another (a copy where there are several)."""
        weights = [linear.weight for linear in self.linears]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    @property
    def channels(self) -> int:
        """Channels of the producer's scale."""
        return int(self.tie.max()) + 1

    def gather(self, values: Tensor) -> Tensor:
        """``[in]`` to ``[channels]``: the mean over the input channels that share a scale."""
        total = values.new_zeros(self.channels).index_add_(0, self.tie, values)
        return total / torch.bincount(self.tie, minlength=self.channels)


@dataclass(slots=True)
class SiteStatistics:
    """What calibration tells of a site's inputs x ``[tokens, in]``, all float32.

    Attributes:
        absmean, absmax: ``[in]``, of ``|x|``.
        hessian: ``[in, in]``: the mean of ``x xT``; None unless the recipe needs it.
        sample: ``[n, in]``, n up to SAMPLE tokens, evenly spaced over all; None unless the recipe needs it.
        cross: ``[in, in]``: the mean of ``(x_float - x) xT``, x_float being what the unquantised model would have given
            here; None unless the recipe needs it.
        energy: of the site's outputs, once it is known: scales leave it as it is; 0: not yet.
    """

    tokens: int
    absmean: Tensor
    absmax: Tensor
    hessian: Tensor | None = None
    sample: Tensor | None = None
    cross: Tensor | None = None
    energy: float = 0.0

    @property
    def outlier(self) -> float:
        """The largest magnitude over the mean one."""
        return float(self.absmax.max() / self.absmean.mean().clamp(min=1e-12))

    def scaled(self, s: Tensor) -> None:
        """Take the statistics of ``x / s``, ``s [in]``, in place."""
        self.absmean, self.absmax = self.absmean / s, self.absmax / s
        for matrix in (self.hessian, self.cross):
            if matrix is not None:
                matrix.div_(s).div_(s[:, None])
        if self.sample is not None:
            self.sample.div_(s)


@dataclass(slots=True)
class SiteReport:
    """What was found and chosen at a site.

    Attributes:
        loss: ``E|W'x - Wx|^2 / E|Wx|^2``, after everything. baseline: the same of rounding to the nearest.
        choices: for the report, such as ``{'ratio': 0.35, 'order': 'static'}``.
        outliers: the inputs' largest magnitude over their mean one, before and after scaling; filled in by the driver.
    """

    loss: float
    baseline: float
    choices: dict[str, str | float | int | bool] = field(default_factory=dict)
    outliers: tuple[float, float] = (0.0, 0.0)


@dataclass(slots=True)
class Fitted:
    """A quantised site.

    Attributes:
        bundles: by role, with scales in the type in which they will be stored; biases are the driver's business.
    """

    bundles: dict[str, LinearBundle]
    report: SiteReport


@dataclass(slots=True)
class Block:
    """A whole fitted layer, for tuning.

    Attributes:
        weights: the float32 weights that were fitted (after transforms and scales).
        fitted: by site; ``tune`` replaces bundles in it.
        pieces: yields ``(x, y)``, each ``[sequences, length, hidden] float32``: the layer's inputs from the quantised
            layers before it, and the outputs of the float32 weights, for the same inputs or, where the recipe needs
            ``'cross'``, for those that the unquantised model has here; always the same pieces.
        forward: ``(x, weights by role) -> y``, differentiable in the weights ``[out, in] float32``.
    """

    weights: LayerWeights
    fitted: dict[SiteName, Fitted]
    pieces: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    forward: Callable[[Tensor, Mapping[str, Tensor]], Tensor]


class Recipe(ABC):
    """A way of quantising. The defaults transform, scale and tune nothing.

    Attributes:
        name: for messages and the report.
        effort: how much time to spend.
        needs: statistics beyond ``absmean`` and ``absmax``.
    """

    name: str
    effort: Effort = 'normal'
    needs: frozenset[Need] = frozenset()

    @abstractmethod
    def key(self) -> dict[str, object]:
        """Everything that the result depends on, as plain JSON: a run is only resumed with an equal one."""

    @abstractmethod
    def storage(self, layer: int, site: SiteName) -> Storage | None:
        """How the site's linears will be stored; None: they stay dense."""

    @abstractmethod
    def fit(self, site: Site, statistics: SiteStatistics) -> Fitted:
        """Quantise the site; called only where :meth:`storage` is not None. The statistics may be used up."""

    def prepare(self, spec: DecoderSpec) -> None:
        """Learn what the model is, before anything is asked.

        Raises:
            ConfigError: it cannot be quantised so.
        """
        return None

    def dense(self, bundle: LinearBundle) -> Tensor:
        """``[out, in] float32``: what plain inputs are multiplied by to the same effect as by ``bundle``."""
        return plain_weight(bundle)

    def inputs(self, bundle: LinearBundle, x: Tensor) -> Tensor:
        """``x [tokens, in]`` as ``bundle`` sees it: with its activations rounded, if it rounds them, token by token."""
        kind, name = bundle.scheme.activation, bundle.input_transform
        if not kind or bundle.scheme.static:
            return x
        turned = transform(x, name)
        codes, scales = quantize_tokens.reference(turned, kind, bundle.scheme.activation_group)
        group = bundle.scheme.activation_group or x.shape[-1]
        return transform(codes.float() * scales.repeat_interleave(group, 1)[:, :x.shape[-1]], name)

    def transform_top(self, top: TopWeights) -> None:
        """Change embedding, final norm and head in place, before any layer."""
        return None

    def transform(self, layer: LayerWeights) -> None:
        """Change a layer in place, right after it is read; function-preserving together with :meth:`transform_top`."""
        return None

    def scale(self, site: Site, statistics: SiteStatistics) -> Tensor | None:
        """``[site.channels] float32``, all positive: scales to move from the inputs into the weights; None: none."""
        return None

    def tune(self, block: Block) -> None:
        """Improve ``block.fitted`` in place."""
        return None

    def extra_config(self) -> dict[str, object]:
        """Fields that ``quantization_config`` needs beyond those of the storages (such as ``transform_config``)."""
        return {}


def relative_loss(delta: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """``tr(D H D^T) / tr(W H W^T)``: the error of a site's outputs, relative to their energy.

    Args:
        delta: ``[out, in]``, what was changed. weight: ``[out, in]``. hessian: ``[in, in]``, the mean of ``x xT``.
    """
    energy = ((weight @ hessian) * weight).sum(dtype=torch.float64)
    return float(((delta @ hessian) * delta).sum(dtype=torch.float64) / energy.clamp(min=1e-30))

"""GatedMLP and its first half; MLP, without a gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.nn.build import Build
from lmdeploy.nn.linear import Linear, check_parts, read_bundle
from lmdeploy.ops.quantize import CodesOf, TokenCodes
from lmdeploy.parallel.split import Split, share_channels
from lmdeploy.quant.blocks import alike
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.kernels import GatedKernel, GatedTakesCodes, KernelCase, choose_gated
from lmdeploy.quant.shard import slice_outputs
from lmdeploy.quant.transform import transformed, without_transform
from lmdeploy.weights.checkpoint import Prefix


class GatedLinear:
    """``activation(gate(x)) * up(x)``: two linears of one shape and what joins them, as one layer.

    Args:
        in_features, out_features: of each of the two.
        activation: a name in ``lmdeploy.ops.activation.ACTIVATIONS``.
        bias: whether the checkpoint must hold biases.
        shares: for every rank, the index of its outputs; None: this rank has all of them.
    """

    def __init__(self, build: Build, in_features: int, out_features: int, activation: str, bias: bool = False,
                 shares: Sequence[Tensor] | None = None) -> None:  # fmt: skip
        self.build, self.activation, self.bias = build, activation, bias
        self.in_features, self.out_features = in_features, out_features
        self.split, self.shares = Split.OUT, shares
        self.kernel: GatedKernel | None = None
        self._packed: Any = None
        self.takes: CodesOf | None = None  # how inputs may be quantised before they come here

    def check(self, gate: Prefix, up: Prefix) -> None:
        """Refuse from headers alone what :meth:`load` cannot read; raises as :func:`check_parts`."""
        check_parts(self.build, (gate, up), self.in_features, (self.out_features,) * 2)

    def load(self, gate: Prefix, up: Prefix) -> None:
        """Pull both linears from the checkpoint.

        Raises:
            LoadError: a tensor is missing or has the wrong shape.
        """
        parts = [read_bundle(self.build, p, self.in_features, self.out_features, self.bias) for p in (gate, up)]
        self.set(*alike(parts))

    def set(self, gate: LinearBundle, up: LinearBundle) -> None:
        """Take two bundles of whole layers as the parameters; they are given to the kernel and not kept."""
        if self.shares is not None:
            own = self.shares[self.build.group.rank]
            gate, up = slice_outputs(gate, own), slice_outputs(up, own)
        case = KernelCase(gate.scheme, self.build.dtype, self.build.device, gate.out_features, gate.in_features)
        self.kernel = choose_gated(case)
        self._packed = self.kernel.pack(without_transform(gate), without_transform(up), case)
        self._apply = transformed(self.kernel.apply, gate.input_transform)
        if isinstance(self.kernel, GatedTakesCodes) and not gate.input_transform:
            self.takes = self.kernel.takes(self._packed)

    def __call__(self, x: Tensor | TokenCodes, then: CodesOf | None = None) -> Tensor | TokenCodes:
        """``[T, out]`` of ``x [T, in]``, which may be quantised as :attr:`takes` says; if it is, so is the result, as
        ``then`` says for the layer behind this one."""
        if isinstance(x, TokenCodes):
            assert isinstance(self.kernel, GatedTakesCodes)
            if then is not None and len(x.codes) > then.above:
                return self.kernel.apply_to_codes(x, self._packed, self.activation, self.build.dtype, then)
            return self.kernel.apply_codes(x, self._packed, self.activation, self.build.dtype)
        return self._apply(x, self._packed, self.activation)


class GatedMLP:
    """``down(activation(gate(x)) * up(x))``: ``[T, hidden_size]`` to the same, over ``intermediate_size`` channels."""

    def __init__(self, build: Build, hidden_size: int, intermediate_size: int, activation: str, bias: bool) -> None:
        shares = channel_shares(build, intermediate_size)
        self.gate_up = GatedLinear(build, hidden_size, intermediate_size, activation, bias, shares)
        self.down = Linear(build, intermediate_size, (hidden_size,), bias, Split.IN, shares)

    def __call__(self, x: Tensor | TokenCodes) -> Tensor:
        return self.down(self.gate_up(x, self.down.takes))


def channel_shares(build: Build, channels: int) -> list[Tensor] | None:
    """For every rank, the index of its part of a layer's inner channels; None: there is one rank."""
    ranks = range(build.group.size)
    return None if len(ranks) == 1 else [torch.tensor(share_channels(channels, rank, len(ranks))) for rank in ranks]


class MLP:
    """``down(activation(up(x)))`` with biases.

    Args:
        in_features, hidden_features, out_features: widths; the last one is the first where it is not given.
        activation: ``'gelu'``, ``'gelu_tanh'``, ``'quick_gelu'``, ``'relu'`` or ``'silu'``.
        bias: whether the checkpoint must hold biases.
    """

    def __init__(self, build: Build, in_features: int, hidden_features: int, activation: str,
                 out_features: int | None = None, bias: bool = True) -> None:  # fmt: skip
        self.activation = activation
        shares = channel_shares(build, hidden_features)
        self.up = Linear(build, in_features, (hidden_features,), bias, Split.OUT, shares)
        self.down = Linear(build, hidden_features, (out_features or in_features,), bias, Split.IN, shares)

    def load(self, up: Prefix, down: Prefix) -> None:
        """Pull both linears from the checkpoint.

        Raises:
            LoadError: a tensor is missing or has the wrong shape.
        """
        self.up.load(up)
        self.down.load(down)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(activate(self.up(x), self.activation))


def activate(x: Tensor, name: str) -> Tensor:
    """The activation ``name`` of every element."""
    if name == 'quick_gelu':
        return x * torch.sigmoid(1.702 * x)
    if name in ('relu', 'silu'):
        return F.relu(x) if name == 'relu' else F.silu(x)
    return F.gelu(x, approximate='tanh' if name == 'gelu_tanh' else 'none')

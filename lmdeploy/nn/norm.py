"""RMSNorm and LayerNorm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lmdeploy.nn.build import Build
from lmdeploy.ops.layer_norm import add_layer_norm
from lmdeploy.ops.norm import add_rms_norm, norm_add_rms_norm, rms_norm
from lmdeploy.ops.quantize import CodesOf, TokenCodes, add_rms_norm_quantize, rms_norm_quantize
from lmdeploy.weights.checkpoint import Prefix


class RMSNorm:
    """RMS norm over the last ``size`` channels.

    ``plus_one``: the checkpoint stores the weight's difference from 1; the sum is kept in float32, where it is exact
    enough.
    """

    def __init__(self, build: Build, size: int, eps: float, plus_one: bool = False) -> None:
        self.build, self.size, self.eps, self.plus_one = build, size, eps, plus_one
        self.weight: Tensor

    def load(self, prefix: Prefix) -> None:
        weight = prefix.get('weight', (self.size,), self.build.dtype)
        self.weight = (weight.float() + 1.0 if self.plus_one else weight).to(self.build.device)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor, post: RMSNorm | None = None) -> tuple[Tensor, Tensor]:
        """``(norm(s), s)`` of the sum ``s = x + residual``, in which ``post``, if given, normalises x first."""
        if post is None:
            return add_rms_norm(x, residual, self.weight, self.eps)
        return norm_add_rms_norm(x, residual, post.weight, self.weight, self.eps)

    def for_layer(self, takes: CodesOf | None, x: Tensor, residual: Tensor | None = None,
                  post: RMSNorm | None = None) -> tuple[Tensor | TokenCodes, Tensor]:  # fmt: skip
        """As :meth:`add`, for a layer that wants its inputs as ``takes`` says; without ``residual``, x is the sum."""
        if takes is None or len(x) <= takes.above or post is not None:
            return (self(x), x) if residual is None else self.add(x, residual, post)
        how = takes.kind, takes.group, takes.turned
        if residual is None:
            return TokenCodes(*rms_norm_quantize(x, self.weight, self.eps, *how)), x
        *codes, total = add_rms_norm_quantize(x, residual, self.weight, self.eps, *how)
        return TokenCodes(*codes), total


class LayerNorm:
    """Layer norm over the last ``size`` channels; old checkpoints call its weights gamma and beta."""

    def __init__(self, build: Build, size: int, eps: float) -> None:
        self.build, self.size, self.eps = build, size, eps
        self.weight: Tensor
        self.bias: Tensor

    def load(self, prefix: Prefix) -> None:
        names = ('gamma', 'beta') if prefix.has('gamma') else ('weight', 'bias')
        self.weight, self.bias = (prefix.get(name, (self.size,), self.build.dtype).to(self.build.device)
                                  for name in names)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(norm(s), s)`` of the sum ``s = residual + x * scale``; all ``[T, size]``, ``scale [size]`` or None."""
        return add_layer_norm(x, residual, scale, self.weight, self.bias, self.eps)

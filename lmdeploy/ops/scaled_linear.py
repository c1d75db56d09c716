"""Products of codes of 8 bits on both sides: W8A8, in integers or float8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.ops.linear import GATE_GROUP
from lmdeploy.ops.table import op


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A weight ``W.T [out, in] = codes * scales``.

    Attributes:
        codes: ``[out, in]``, int8 or float8, contiguous.
        scales: ``[groups, out] float32``. group: input channels that share a row of them; 0: all.
        bias: ``[out]``, or None.
        gated: output channels of two layers alternate in groups of GATE_GROUP.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    group: int = 0
    gated: bool = False

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


@op
def scaled_linear(codes: Tensor, scales: Tensor, weight: ScaledWeight, activation: str, dtype: torch.dtype) -> Tensor:
    """``x @ W + bias`` for ``x = codes * scales``; of gated layers ``activation(gate) * up``.

    Args:
        codes: ``[T, in]`` of the weight's type. scales: ``[T, groups] float32``, where groups are as large as the
            weight's, or ``[T, 1]``.
        activation: a key of ``ACTIVATIONS`` where ``weight.gated``, else ``''``.
        dtype: of what is returned; sums and scales are float32.

    Returns:
        ``[T, out]``, or ``[T, out / 2]`` where gated.
    """
    size = weight.group or codes.shape[1]
    y = torch.zeros(len(codes), len(weight.codes), dtype=torch.float32, device=codes.device)
    for group, at in enumerate(range(0, codes.shape[1], size)):
        part = codes[:, at : at + size].float() @ weight.codes[:, at : at + size].float().t()
        y += part * scales[:, min(group, scales.shape[1] - 1), None] * weight.scales[group]
    if weight.bias is not None:
        y += weight.bias.float()
    if weight.gated:
        both = y.unflatten(-1, (-1, 2, GATE_GROUP))
        y = ACTIVATIONS[activation](torch.cat((both[..., 0, :].flatten(-2), both[..., 1, :].flatten(-2)), -1))
    return y.to(dtype)

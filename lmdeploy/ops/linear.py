"""Dense linear: the product of a layer's inputs with a plain weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.ops.table import op

GATE_GROUP = 8  # channels that alternate in an interleaved weight: so many of the gate, so many of up


@op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``: ``x [..., in]``, ``weight [out, in]``, ``bias [out]`` or None give ``[..., out]``."""
    return F.linear(x, weight, bias)


@op
def linear_float(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As :func:`linear`, but float32: for logits. The reference rounds the product to x's type on its way."""
    return F.linear(x, weight, bias).float()


@op
def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(gate(x)) * up(x)`` where ``weight`` holds both, interleaved.

    Args:
        x: ``[T, in]``. weight: ``[2 I, in]``: GATE_GROUP rows of the gate, GATE_GROUP of up, and so on; see
            :func:`interleave`. bias: ``[2 I]`` in the same order, or None.
        activation: a key of ``ACTIVATIONS``.

    Returns:
        ``[T, I]``.
    """
    both = F.linear(x, weight, bias).unflatten(-1, (-1, 2, GATE_GROUP))
    return ACTIVATIONS[activation](torch.cat((both[..., 0, :].flatten(-2), both[..., 1, :].flatten(-2)), -1))


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of two tensors ``[I, ...]`` in the order of :func:`gated_linear`; I is a multiple of GATE_GROUP."""
    groups = (t.unflatten(0, (-1, GATE_GROUP)) for t in (gate, up))
    return torch.stack(tuple(groups), 1).flatten(0, 2)

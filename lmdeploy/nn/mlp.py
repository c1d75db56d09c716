"""GatedMLP."""

from __future__ import annotations

from torch import Tensor

from lmdeploy.nn.build import Build
from lmdeploy.nn.linear import Linear
from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.parallel.split import Split


class GatedMLP:
    """``down(activation(gate(x)) * up(x))`` with gate and up as one layer.

    Args:
        hidden_size, intermediate_size: widths outside and inside.
        activation: a name in ``lmdeploy.ops.activation.ACTIVATIONS``.
        bias: whether the linears have biases.
    """

    def __init__(self, build: Build, hidden_size: int, intermediate_size: int, activation: str, bias: bool) -> None:
        self.gate_up = Linear(build, hidden_size, (intermediate_size, intermediate_size), bias, Split.OUT)
        self.down = Linear(build, intermediate_size, (hidden_size,), bias, Split.IN)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate_up(x)))

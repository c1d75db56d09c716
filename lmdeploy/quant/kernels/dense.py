"""Kernels of dense weights."""

from __future__ import annotations

from torch import Tensor

from lmdeploy.ops.cpu import features
from lmdeploy.ops.cpu import linear as cpu
from lmdeploy.ops.linear import GATE_GROUP, gated_linear, interleave, linear, linear_float
from lmdeploy.ops.table import OpCase
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.kernels.base import KernelCase, dense_of


class PackedDense:
    """oneDNN on the CPU, see :mod:`lmdeploy.ops.cpu.linear`."""

    name = 'onednn_packed'

    def refuse(self, case: KernelCase) -> list[str]:
        return _refuse_packed(case)

    def pack(self, bundle: LinearBundle, case: KernelCase) -> cpu.PackedWeight:
        weight, bias = dense_of(bundle, case)
        return cpu.pack(weight, bias)

    def apply(self, x: Tensor, packed: cpu.PackedWeight) -> Tensor:
        return cpu.packed_linear(x, packed)

    def apply_float(self, x: Tensor, packed: cpu.PackedWeight) -> Tensor:
        return cpu.packed_linear(x, packed).float()

    def rounds(self, case: KernelCase) -> bool:
        return case.dtype.itemsize < 4


class Dense:
    """The op table's product, on any device: torch's own, and one for few rows on a GPU."""

    name = 'torch'

    def refuse(self, case: KernelCase) -> list[str]:
        return [] if case.scheme.dense else ['needs a dense weight']

    def pack(self, bundle: LinearBundle, case: KernelCase) -> tuple[Tensor, Tensor | None]:
        return dense_of(bundle, case)

    def apply(self, x: Tensor, packed: tuple[Tensor, Tensor | None]) -> Tensor:
        return linear(x, *packed)

    def apply_float(self, x: Tensor, packed: tuple[Tensor, Tensor | None]) -> Tensor:
        return linear_float(x, *packed)

    def rounds(self, case: KernelCase) -> bool:
        return case.dtype.itemsize < 4 and linear_float.falls_back(OpCase(case.device.type, case.dtype))


class PackedGated:
    """oneDNN with the activation and the product as epilogues of the two multiplications."""

    name = 'onednn_gated'

    def refuse(self, case: KernelCase) -> list[str]:
        return _refuse_packed(case)

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> tuple[cpu.PackedWeight, cpu.PackedWeight]:
        return cpu.pack(*dense_of(gate, case)), cpu.pack(*dense_of(up, case))

    def apply(self, x: Tensor, packed: tuple[cpu.PackedWeight, cpu.PackedWeight], activation: str) -> Tensor:
        return cpu.packed_gated(x, *packed, activation)


class Interleaved:
    """One product with the rows of gate and up interleaved, and the activation in its epilogue where rows are few."""

    name = 'interleaved'

    def refuse(self, case: KernelCase) -> list[str]:
        reasons = []
        if not case.scheme.dense:
            reasons.append('needs a dense weight')
        if gated_linear.falls_back(OpCase(case.device.type, case.dtype)):
            reasons.append(f'no kernel for {case.dtype} on {case.device.type}')
        if case.out_features % GATE_GROUP:
            reasons.append(f'needs a multiple of {GATE_GROUP} channels')
        return reasons

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> tuple[Tensor, Tensor | None]:
        (gate_weight, gate_bias), (up_weight, up_bias) = dense_of(gate, case), dense_of(up, case)
        weight = interleave(gate_weight, up_weight)
        if gate_bias is None and up_bias is None:
            return weight, None
        nothing = weight.new_zeros(gate.out_features)
        return weight, interleave(*(nothing if bias is None else bias for bias in (gate_bias, up_bias)))

    def apply(self, x: Tensor, packed: tuple[Tensor, Tensor | None], activation: str) -> Tensor:
        return gated_linear(x, *packed, activation)


def _refuse_packed(case: KernelCase) -> list[str]:
    reasons = []
    if case.device.type != 'cpu':
        reasons.append('runs on cpu')
    if not case.scheme.dense:
        reasons.append('needs a dense weight')
    if not features.packed_linear(case.dtype):
        reasons.append(f'oneDNN does not multiply {case.dtype} here')
    return reasons

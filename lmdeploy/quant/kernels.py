"""LinearKernel: how a layer's weight is multiplied, chosen by its scheme, type and device.

Candidates are ordered; the first without a reason against it is taken. If all refuse, the error says why each did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lmdeploy.errors import ConfigError
from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.ops.cpu import features
from lmdeploy.ops.cpu import linear as cpu
from lmdeploy.ops.linear import linear
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.rows import join
from lmdeploy.quant.scheme import QuantScheme

K = TypeVar('K', 'LinearKernel', 'GatedKernel')


@dataclass(frozen=True, slots=True)
class KernelCase:
    """What a choice depends on; ``dtype`` is that of the activations."""

    scheme: QuantScheme
    dtype: torch.dtype
    device: torch.device


class LinearKernel(Protocol):
    """One way of multiplying. ``pack`` turns a bundle into what ``apply`` wants, on the device, once."""

    name: str

    def refuse(self, case: KernelCase) -> list[str]: ...

    def pack(self, bundle: LinearBundle, case: KernelCase) -> Any: ...

    def apply(self, x: Tensor, packed: Any) -> Tensor: ...


class PackedDense:
    """oneDNN on the CPU, see :mod:`lmdeploy.ops.cpu.linear`."""

    name = 'onednn_packed'

    def refuse(self, case: KernelCase) -> list[str]:
        return _refuse_packed(case)

    def pack(self, bundle: LinearBundle, case: KernelCase) -> cpu.PackedWeight:
        weight, bias = _dense(bundle, case)
        return cpu.pack(weight, bias)

    def apply(self, x: Tensor, packed: cpu.PackedWeight) -> Tensor:
        return cpu.packed_linear(x, packed)


class Dense:
    """torch's own product, on any device."""

    name = 'torch'

    def refuse(self, case: KernelCase) -> list[str]:
        return [] if case.scheme.dense else ['needs a dense weight']

    def pack(self, bundle: LinearBundle, case: KernelCase) -> tuple[Tensor, Tensor | None]:
        return _dense(bundle, case)

    def apply(self, x: Tensor, packed: tuple[Tensor, Tensor | None]) -> Tensor:
        return linear(x, *packed)


class GatedKernel(Protocol):
    """One way of computing ``activation(gate(x)) * up(x)``, for the activations of ``ops.activation.ACTIVATIONS``."""

    name: str

    def refuse(self, case: KernelCase) -> list[str]: ...

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> Any: ...

    def apply(self, x: Tensor, packed: Any, activation: str) -> Tensor: ...


class PackedGated:
    """oneDNN with the activation and the product as epilogues of the two multiplications."""

    name = 'onednn_gated'

    def refuse(self, case: KernelCase) -> list[str]:
        return _refuse_packed(case)

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> tuple[cpu.PackedWeight, cpu.PackedWeight]:
        return cpu.pack(*_dense(gate, case)), cpu.pack(*_dense(up, case))

    def apply(self, x: Tensor, packed: tuple[cpu.PackedWeight, cpu.PackedWeight], activation: str) -> Tensor:
        return cpu.packed_gated(x, *packed, activation)


class Merged:
    """Gate and up as one layer of whatever kernel suits them, then the activation as an op."""

    name = 'merged'

    def refuse(self, case: KernelCase) -> list[str]:
        return []

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> tuple[LinearKernel, Any]:
        kernel = choose_kernel(case)
        return kernel, kernel.pack(join((gate, up)), case)

    def apply(self, x: Tensor, packed: tuple[LinearKernel, Any], activation: str) -> Tensor:
        kernel, weights = packed
        return ACTIVATIONS[activation](kernel.apply(x, weights))


LINEAR: list[LinearKernel] = [PackedDense(), Dense()]
GATED: list[GatedKernel] = [PackedGated(), Merged()]


def choose_kernel(case: KernelCase) -> LinearKernel:
    """The first kernel of a linear layer that does not refuse.

    Raises:
        ConfigError: LMD-118, with every candidate's reasons.
    """
    return _choose(LINEAR, case)


def choose_gated(case: KernelCase) -> GatedKernel:
    """The first kernel of the two gated layers of an MLP that does not refuse; as :func:`choose_kernel`."""
    return _choose(GATED, case)


def _choose(kernels: Sequence[K], case: KernelCase) -> K:
    reasons = []
    for kernel in kernels:
        against = kernel.refuse(case)
        if not against:
            return kernel
        reasons.append(f'{kernel.name}: {", ".join(against)}')
    raise ConfigError('LMD-118', scheme=case.scheme.name, device=case.device, reasons='; '.join(reasons))


def _refuse_packed(case: KernelCase) -> list[str]:
    reasons = []
    if case.device.type != 'cpu':
        reasons.append('runs on cpu')
    if not case.scheme.dense:
        reasons.append('needs a dense weight')
    if not features.packed_linear(case.dtype):
        reasons.append(f'oneDNN does not multiply {case.dtype} here')
    return reasons


def _dense(bundle: LinearBundle, case: KernelCase) -> tuple[Tensor, Tensor | None]:
    if bundle.weight is None:
        raise TypeError(f'a bundle of scheme {bundle.scheme.name} has no dense weight')
    bias = bundle.bias
    return bundle.weight.to(case.device, case.dtype), None if bias is None else bias.to(case.device, case.dtype)

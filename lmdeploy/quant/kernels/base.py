"""The faces of kernels, what a choice depends on, and the bundles that dense kernels take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lmdeploy.ops.quantize import CodesOf, TokenCodes
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.dequant import dequantize_bundle
from lmdeploy.quant.scheme import FLOAT8, QuantScheme, dense_scheme
from lmdeploy.weights.dequant import BLOCK_TYPES

SCALED = ('int', *FLOAT8)  # codes with scales beside them
KNOWN = (*SCALED, *BLOCK_TYPES)


@dataclass(frozen=True, slots=True)
class KernelCase:
    """What a choice depends on; ``dtype`` is that of the activations, widths (0: any) are those of the layer.

    Of two gated layers, which have one width, it is that of each.
    """

    scheme: QuantScheme
    dtype: torch.dtype
    device: torch.device
    out_features: int = 0
    in_features: int = 0


class LinearKernel(Protocol):
    """One way of multiplying. ``pack`` turns a bundle into what ``apply`` wants, on the device, once."""

    name: str

    def refuse(self, case: KernelCase) -> list[str]: ...

    def pack(self, bundle: LinearBundle, case: KernelCase) -> Any: ...

    def apply(self, x: Tensor, packed: Any) -> Tensor: ...

    def apply_float(self, x: Tensor, packed: Any) -> Tensor:
        """The product in float32, which logits are; see :attr:`rounds`."""
        ...

    def rounds(self, case: KernelCase) -> bool:
        """Whether ``apply_float`` rounds to the type of the activations on its way."""
        ...


class GatedKernel(Protocol):
    """One way of computing ``activation(gate(x)) * up(x)``, for the activations of ``ops.activation.ACTIVATIONS``."""

    name: str

    def refuse(self, case: KernelCase) -> list[str]: ...

    def pack(self, gate: LinearBundle, up: LinearBundle, case: KernelCase) -> Any: ...

    def apply(self, x: Tensor, packed: Any, activation: str) -> Tensor: ...


@runtime_checkable
class HasRows(Protocol):
    """A linear kernel that tells what it multiplies with, for results that are worth being computed again."""

    def rows(self, ids: Tensor, packed: Any) -> Tensor:
        """The weights ``[n, in] float32`` of the outputs ``ids [n]``."""


@runtime_checkable
class TakesCodes(Protocol):
    """A linear kernel whose inputs may be quantised by what makes them, such as a norm."""

    def takes(self, packed: Any) -> CodesOf | None:
        """How it wants them; None: it quantises them itself."""

    def apply_codes(self, x: TokenCodes, packed: Any, dtype: torch.dtype) -> Tensor:
        """As ``apply``, the result in ``dtype``."""


@runtime_checkable
class GatedTakesCodes(Protocol):
    """The same of gated layers, whose result may be quantised for the layer behind them."""

    def takes(self, packed: Any) -> CodesOf | None: ...

    def apply_codes(self, x: TokenCodes, packed: Any, activation: str, dtype: torch.dtype) -> Tensor: ...

    def apply_to_codes(self, x: TokenCodes, packed: Any, activation: str, dtype: torch.dtype,
                       then: CodesOf) -> TokenCodes:  # fmt: skip
        """As ``apply``, the result rounded to ``dtype`` and quantised as ``then`` says."""


def dense_of(bundle: LinearBundle, case: KernelCase) -> tuple[Tensor, Tensor | None]:
    """Weight ``[out, in]`` and bias of a dense bundle, in the type and on the device of ``case``."""
    if bundle.weight is None:
        raise TypeError(f'a bundle of scheme {bundle.scheme.name} has no dense weight')
    bias = bundle.bias
    return bundle.weight.to(case.device, case.dtype), None if bias is None else bias.to(case.device, case.dtype)


def dense_case(case: KernelCase, dtype: torch.dtype) -> KernelCase:
    """The case of the dense weight, in ``dtype``, that one of ``case`` stands for."""
    return replace(case, scheme=dense_scheme(dtype.itemsize * 8), dtype=dtype)


def dequantised(bundle: LinearBundle, case: KernelCase) -> LinearBundle:
    """The dense bundle of ``case`` that a quantised one stands for."""
    if bundle.input_transform:
        raise TypeError(f'no kernel transforms inputs by {bundle.input_transform}')
    weight = dequantize_bundle(bundle, case.dtype)
    return LinearBundle(case.scheme, bundle.out_features, bundle.in_features, weight=weight, bias=bundle.bias)

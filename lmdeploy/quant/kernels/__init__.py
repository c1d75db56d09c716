"""LinearKernel: how a layer's weight is multiplied, chosen by its scheme, type and device.

Candidates are ordered; the first without a reason against it is taken. If all refuse, the error says why each did.
"""

from __future__ import annotations

from lmdeploy.quant.kernels.base import GatedKernel, KernelCase, LinearKernel
from lmdeploy.quant.kernels.choice import (
    GATED,
    LINEAR,
    choose_gated,
    choose_kernel,
    explain,
    register_gated,
    register_linear,
    withdraw,
)
from lmdeploy.quant.kernels.dense import Dense, Interleaved, PackedDense, PackedGated
from lmdeploy.quant.kernels.dequantised import Dequantised, DequantisedGated, Merged, QuantisedInput, QuantisedPack

LINEAR += [PackedDense(), Dense(), Dequantised(), QuantisedInput()]
GATED += [PackedGated(), Interleaved(), DequantisedGated(), Merged()]

__all__ = [
    'Dense',
    'Dequantised',
    'DequantisedGated',
    'GATED',
    'GatedKernel',
    'Interleaved',
    'KernelCase',
    'LINEAR',
    'LinearKernel',
    'Merged',
    'PackedDense',
    'PackedGated',
    'QuantisedInput',
    'QuantisedPack',
    'choose_gated',
    'choose_kernel',
    'explain',
    'register_gated',
    'register_linear',
    'withdraw',
]

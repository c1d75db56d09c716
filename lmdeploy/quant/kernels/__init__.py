"""LinearKernel: how a layer's weight is multiplied, chosen by its scheme, type and device.

Candidates are ordered; the first without a reason against it is taken. If all refuse, the error says why each did.
"""

from __future__ import annotations

from lmdeploy.quant.kernels.base import GatedKernel, GatedTakesCodes, HasRows, KernelCase, LinearKernel, TakesCodes
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
from lmdeploy.quant.kernels.cpu import Int4, Int4Inputs, Int8, Int8Inputs, WideInt8
from lmdeploy.quant.kernels.dense import Dense, Interleaved, PackedDense, PackedGated
from lmdeploy.quant.kernels.dequantised import Dequantised, DequantisedGated, Merged, QuantisedInput, QuantisedPack
from lmdeploy.quant.kernels.triton import PackedGatedProduct, PackedProduct, ScaledGatedProduct, ScaledProduct

LINEAR += [PackedDense(), Dense(), PackedProduct(), ScaledProduct(), Int4(), WideInt8(), Int8(), Int8Inputs(),
           Int4Inputs(), Dequantised(), QuantisedInput()]  # fmt: skip
GATED += [PackedGated(), Interleaved(), PackedGatedProduct(), ScaledGatedProduct(), DequantisedGated(), Merged()]

__all__ = [
    'Dense',
    'Dequantised',
    'DequantisedGated',
    'GATED',
    'GatedKernel',
    'GatedTakesCodes',
    'HasRows',
    'Int4',
    'Int4Inputs',
    'Int8',
    'Int8Inputs',
    'Interleaved',
    'KernelCase',
    'LINEAR',
    'LinearKernel',
    'Merged',
    'PackedDense',
    'PackedGated',
    'PackedGatedProduct',
    'PackedProduct',
    'QuantisedInput',
    'QuantisedPack',
    'ScaledGatedProduct',
    'ScaledProduct',
    'TakesCodes',
    'WideInt8',
    'choose_gated',
    'choose_kernel',
    'explain',
    'register_gated',
    'register_linear',
    'withdraw',
]

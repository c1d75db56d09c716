"""What this processor and this build of torch multiply well."""

from __future__ import annotations

import functools
import platform

import torch


@functools.cache
def native_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16, AMX, or Arm's BF16 extension)."""
    if _has('_is_avx512_bf16_supported') or _has('_is_amx_tile_supported'):
        return True
    return _arm() and _arm_bf16()


@functools.cache
def packed_linear(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies packed weights of ``dtype`` here."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype is torch.float32


@functools.cache
def stable_rows(dtype: torch.dtype) -> bool:
    """Whether a row of a packed product has the same bits in any batch.

    Float32 rows have. Bfloat16 rows have where AVX512-BF16 multiplies them; AMX splits its sums by the batch.
    """
    if dtype is torch.bfloat16:
        return packed_linear(dtype) and not _has('_is_amx_tile_supported') and _has('_is_avx512_bf16_supported')
    return packed_linear(dtype)


@functools.cache
def packed_codes() -> bool:
    """Whether torch's products with packed 4- and 8-bit weights use vector instructions here."""
    return torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512') or _arm()


@functools.cache
def int8_dot() -> bool:
    """Whether oneDNN multiplies 8-bit integers exactly and fast: AVX512-VNNI or AMX.

    Without them it adds pairs of products in 16 bits, which overflow.
    """
    return torch.backends.mkldnn.is_available() and (_has('_is_vnni_supported') or _has('_is_amx_tile_supported'))


def auto_dtype() -> torch.dtype:
    """What ``dtype='auto'`` means on the CPU."""
    return torch.bfloat16 if native_bf16() else torch.float32


def _has(check: str) -> bool:
    """The answer of one of torch's tests of the processor; builds for other architectures lack some."""
    return getattr(torch.cpu, check, bool)()


def _arm() -> bool:
    return platform.machine().lower() in ('aarch64', 'arm64')


def _arm_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

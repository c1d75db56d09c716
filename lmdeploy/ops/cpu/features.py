"""What this processor and this build of torch multiply well."""

from __future__ import annotations

import functools
import platform

import torch


@functools.cache
def native_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16, AMX, or Arm's BF16 extension)."""
    checks = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    if any(getattr(torch.cpu, check, lambda: False)() for check in checks):
        return True
    return platform.machine().lower() in ('aarch64', 'arm64') and _arm_bf16()


@functools.cache
def packed_linear(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies packed weights of ``dtype`` here."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype is torch.float32


def auto_dtype() -> torch.dtype:
    """What ``dtype='auto'`` means on the CPU."""
    return torch.bfloat16 if native_bf16() else torch.float32


def _arm_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

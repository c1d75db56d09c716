"""What all kernels share: programmatic dependent launch and prefetching.

Every kernel takes ``PDL: tl.constexpr``. With it, the kernel lets the next one start at once (``gdc_launch_dependents``
is the first thing it does) and waits (``gdc_wait``) before it reads what another kernel wrote and before it writes
anything: the wait ends when the kernel before has finished and its writes are visible. Only what no kernel writes, the
weights, may be touched before. A kernel that does not wait breaks the chain for all that follow it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ['Workspace', 'cdiv', 'gdc_launch_dependents', 'gdc_wait', 'multiprocessors', 'next_power_of_2',
           'prefetch_l2', 'supports_pdl']


def cdiv(total: int, part: int) -> int:
    """``total / part`` rounded up. Triton's own function, made for kernels, takes the host some microseconds a call."""
    return -(-total // part)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``, which is positive."""
    return 1 << (number - 1).bit_length()


@lru_cache
def supports_pdl(device: torch.device) -> bool:
    """Whether kernels on ``device`` may be launched before the one in front of them has finished."""
    return device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors ``device`` has; 1 for the interpreter on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


@triton.jit
def prefetch_l2(address, BYTES: tl.constexpr):
    """Bring ``BYTES`` (a multiple of 16) behind each of the pointers ``address`` (multiples of 16) to the L2 cache."""
    size = tl.full(address.shape, BYTES, tl.int32)
    tl.inline_asm_elementwise(
        'cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;', '=r,l,r', [address.to(tl.int64), size],
        dtype=tl.int32, is_pure=False, pack=1)  # fmt: skip


class Workspace:
    """Scratch memory that starts as zeros and that every kernel leaves as it wants to find it.

    Kernels of one stream follow each other, so all of them share it. Captured graphs keep its address: what was handed
    out once is never freed, and it cannot grow during a capture. Run once at the largest size before capturing.
    """

    def __init__(self, dtype: torch.dtype, least: int = 1024) -> None:
        self.dtype, self.least = dtype, least
        self._buffers: dict[torch.device, list[Tensor]] = {}

    def get(self, device: torch.device, size: int) -> Tensor:
        """At least ``size`` elements on ``device``."""
        buffers = self._buffers.setdefault(device, [])
        if not buffers or buffers[-1].numel() < size:
            if device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f'{size} elements of scratch memory are first asked for during a graph capture')
            buffers.append(torch.zeros(max(size, self.least), dtype=self.dtype, device=device))
        return buffers[-1]

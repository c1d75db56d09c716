"""What a device must be for the kernels of this package."""

from __future__ import annotations

import importlib.util

import torch

LEAST_CAPABILITY = (8, 0)  # bfloat16 products on tensor cores
HOPPER = (9, 0)  # an operand in registers beside one in shared memory; sums of bfloat16; tiles copied by the memory


def refuse_triton(device: torch.device, least: tuple[int, int] = LEAST_CAPABILITY) -> list[str]:
    """The reasons against running Triton kernels that need a compute capability of ``least`` on ``device``."""
    if device.type != 'cuda':
        return [f'runs on cuda, not on {device.type}']
    reasons = [] if importlib.util.find_spec('triton') else ['triton is not installed']
    if torch.cuda.get_device_capability(device) < least:
        reasons.append('needs compute capability {}.{}'.format(*least))
    return reasons

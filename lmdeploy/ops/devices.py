"""What a device must be for the kernels of this package."""

from __future__ import annotations

import importlib.util

import torch

LEAST_CAPABILITY = (8, 0)  # bfloat16 products on tensor cores


def refuse_triton(device: torch.device) -> list[str]:
    """The reasons against running Triton kernels on ``device``."""
    if device.type != 'cuda':
        return [f'runs on cuda, not on {device.type}']
    reasons = [] if importlib.util.find_spec('triton') else ['triton is not installed']
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        reasons.append('needs compute capability {}.{}'.format(*LEAST_CAPABILITY))
    return reasons

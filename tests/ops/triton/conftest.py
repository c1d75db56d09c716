"""Kernels run on a GPU, or by Triton's interpreter on the CPU where ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'

if INTERPRETED:
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patched(tensor, scope):
        """Triton 3.6 makes an index of a tensor by ``int()`` of an array of one element, which numpy 2.4 refuses."""
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, '__index__', lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patched


@pytest.fixture
def device() -> torch.device:
    return torch.device('cpu' if INTERPRETED else 'cuda')


@pytest.fixture(params=['float32', 'half'])
def dtype(request) -> torch.dtype:
    """float32, and the device's 16-bit type: the interpreter's bfloat16 arithmetic is wrong."""
    if request.param == 'float32':
        return torch.float32
    return torch.float16 if INTERPRETED else torch.bfloat16

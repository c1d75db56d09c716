"""The block Hadamard transform against its reference."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.ops.hadamard import hadamard
from lmdeploy.ops.triton.hadamard import triton_hadamard
from tests.tolerance import tolerance


@pytest.mark.parametrize(('rows', 'width', 'block'), [(1, 896, 128), (3, 576, 64), (17, 256, 128), (5, 48, 16),
                                                      (2, 24, 8)])  # fmt: skip
def test_the_reference(rows, width, block, dtype, device):
    wide = torch.randn(rows, width + 8, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    x = wide[:, :width]
    torch.testing.assert_close(triton_hadamard(x, block), hadamard.reference(x, block), **tolerance(dtype, 4.0))


def test_any_shape_and_no_rows(dtype, device):
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    torch.testing.assert_close(triton_hadamard(x, 32), hadamard.reference(x, 32), **tolerance(dtype, 4.0))
    assert triton_hadamard(x[:0], 32).shape == (0, 3, 64)

"""The block Hadamard transform: orthogonal, its own inverse, and blind to other blocks."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.ops.hadamard import hadamard, matrix
from tests.tolerance import tolerance


@pytest.mark.parametrize('size', [1, 2, 16, 64, 128])
def test_the_matrix_is_symmetric_orthogonal_and_flat(size):
    made = matrix(size, torch.device('cpu')).double()
    assert torch.equal(made, made.t())
    torch.testing.assert_close(made @ made, torch.eye(size, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(made.abs(), torch.full_like(made, size**-0.5), atol=1e-7, rtol=0)


@pytest.mark.parametrize('size', [0, 3, 96])
def test_sizes_are_powers_of_two(size):
    with pytest.raises(ValueError, match='power of two'):
        matrix(size, torch.device('cpu'))


@pytest.mark.parametrize(('width', 'block'), [(896, 128), (576, 64), (48, 16), (48, 1)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_blocks_are_turned_one_by_one(width, block, dtype):
    x = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = hadamard(x, block)
    assert y.dtype is dtype and y.shape == x.shape
    wanted = torch.cat([part.double() @ matrix(block, x.device).double() for part in x.split(block, -1)], -1)
    torch.testing.assert_close(y, wanted.to(dtype), **tolerance(dtype, 4.0))
    torch.testing.assert_close(hadamard(y.float(), block).to(dtype), x, **tolerance(dtype, 4.0))
    torch.testing.assert_close(y.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-2, atol=0)
    torch.testing.assert_close(y, hadamard.reference(x, block), **tolerance(dtype, 4.0))
    only = x.clone()
    only[..., block:] = 7
    assert torch.equal(hadamard(only, block)[..., :block], y[..., :block])

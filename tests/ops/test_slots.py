"""Sampling over slots against the plain loop over one row's parameters."""

from __future__ import annotations

import numpy as np
import torch

from lmdeploy.ops import sample
from lmdeploy.ops.slots import uniforms


def test_uniforms_are_those_of_the_host():
    random = np.random.default_rng(1)
    seeds = random.integers(0, 1 << 64, 500, dtype=np.uint64)
    draws = random.integers(0, 1 << 20, 500)
    found = uniforms(torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(draws))
    assert np.array_equal(found.numpy(), sample.uniforms(seeds, draws))

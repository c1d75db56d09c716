"""Recorded calls of a vision encoder give what plain ones give, and nothing of an earlier call."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.models.vision.encoder import build_encoder
from lmdeploy.nn.build import Build
from lmdeploy.runner.graphs import rerun
from lmdeploy.runner.tile_graphs import MOST, TileGraphs, records
from lmdeploy.weights.dummy import DummyCheckpoint
from tests.vl import configs


def encoder(config, device: str = 'cpu'):
    found = build_encoder(config, Build(torch.float32, torch.device(device)))
    with torch.no_grad():
        found.load(DummyCheckpoint('x', {}, found.shapes(), torch.device(device)).prefix())
    return found


@pytest.mark.parametrize('config', [configs.internvl(56), configs.llava(size=56)], ids=['internvl', 'llava'])
def test_any_number_of_tiles(config):
    plain = encoder(config)
    recorded = TileGraphs(plain, rerun)
    noise = torch.Generator().manual_seed(0)
    kept = []
    for counts in ((1,), (2, 1), (1,), (3, 1, 2), (MOST + 1,), (1, 1), (MOST,)):
        pixels = [torch.randint(0, 256, (n, 3, 56, 56), dtype=torch.uint8, generator=noise) for n in counts]
        found, wanted = recorded(pixels), plain(pixels)
        kept += zip(found, wanted, strict=True)
    for ours, theirs in kept:
        assert torch.equal(ours, theirs)


def test_pictures_of_their_own_shape_are_not_recorded():
    assert records(encoder(configs.internvl(56))) and not records(encoder(configs.qwen()))


@pytest.mark.gpu
def test_on_a_gpu():
    from lmdeploy.runner.graphs import CudaGraphs

    plain = encoder(configs.internvl(56), 'cuda')
    recorded = TileGraphs(plain, CudaGraphs(torch.device('cuda')))
    for count in (1, 4, 1, MOST, 2):
        pixels = [torch.randint(0, 256, (count, 3, 56, 56), dtype=torch.uint8, device='cuda')]
        for ours, theirs in zip(recorded(pixels), plain(pixels)):
            torch.testing.assert_close(ours, theirs)

"""The shapes that a spec tells are those of the checkpoints; a dummy model runs."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.config.model import ModelConfig
from lmdeploy.models.registry import SPECS, build_model
from lmdeploy.models.shapes import tensor_shapes
from lmdeploy.nn.build import Build
from lmdeploy.weights.checkpoint import open_checkpoint
from lmdeploy.weights.dummy import DummyCheckpoint, read_config
from tests.models.driver import Driver
from tests.models.tiny import ARCHITECTURES, make_tiny


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_dummy_weights_have_the_shapes_of_the_checkpoint(arch, tmp_path):
    folder = make_tiny(arch, tmp_path / arch)
    config = ModelConfig.from_dict(read_config(folder))
    shapes = tensor_shapes(SPECS[config.architecture](config))
    with open_checkpoint(folder) as real:
        stored = {name: real.stored(name).shape for name in real.names()}
    assert shapes == stored
    model = build_model(config, Build())
    dummy = DummyCheckpoint(folder, read_config(folder), shapes, torch.device('cpu'))
    model.load(dummy.prefix())
    dummy.finish()
    logits = Driver(model).sequence([3, 4, 5])
    assert logits.isfinite().all() and logits.std() > 0

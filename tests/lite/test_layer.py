"""Layers without a cache compute what the decoder computes."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.lite.evaluate import Head
from lmdeploy.lite.layer import Layers
from lmdeploy.lite.recipe import SITES
from lmdeploy.lite.source import open_source
from tests.models.conftest import tiny  # noqa: F401
from tests.models.driver import Driver, load_model
from tests.models.tiny import ARCHITECTURES, VOCAB

CPU = torch.device('cpu')


@pytest.mark.parametrize('arch', ARCHITECTURES)
@torch.no_grad()
def test_hidden_states_are_the_decoders(tiny, arch):  # noqa: F811
    folder = tiny(arch)
    ids = torch.randint(3, VOCAB, (60,), generator=torch.Generator().manual_seed(1))
    source = open_source(folder, torch.float32)
    layers, top = Layers.of(source, CPU), source.top(CPU)
    x = (top.embedding[ids] * source.spec.embedding_scale)[None]
    seen = []
    for i in range(source.num_layers):
        x = layers(source.layer(i, CPU), x, lambda site, values: seen.append(site) or values)
    found = Head(top.norm, top.head, source.config.rms_norm_eps).logits(x[0])
    assert seen == list(SITES) * source.num_layers
    torch.testing.assert_close(found, Driver(load_model(folder)).sequence(ids.tolist()), atol=1e-4, rtol=1e-4)
    source.checkpoint.close()


def test_two_sequences_do_not_see_each_other(tiny):  # noqa: F811
    source = open_source(tiny('Qwen2ForCausalLM'), torch.float32)
    layers, layer = Layers.of(source, CPU), source.layer(0, CPU)
    x = torch.randn(2, 9, source.config.hidden_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layers(layer, x), torch.cat([layers(layer, x[:1]), layers(layer, x[1:])]))
    source.checkpoint.close()

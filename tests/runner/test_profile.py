"""The largest step fits the model, whatever the relation of step and session."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kv.cache import KVCache
from lmdeploy.runner.memory import MemoryPlan
from lmdeploy.runner.profile import largest_step
from lmdeploy.runner.slots import SlotTable
from tests.models.driver import load_model
from tests.models.tiny import VOCAB, make_tiny


@pytest.mark.parametrize(('step', 'session'), [(100, 200), (100, 100), (130, 60)])
def test_the_largest_step_touches_the_null_block_and_the_scratch_slot_only(step, session, tmp_path):
    model = load_model(make_tiny('Qwen3ForCausalLM', tmp_path / 'model'))
    kv = KVCache(model.kv_shape, 3)
    slots = SlotTable(5, session, 64, torch.device('cpu'), VOCAB)
    slots.last_token[:-1] = 99
    largest_step(model, kv, slots, MemoryPlan(0, 0, 0, 3, session, 5, step))
    layer = kv.layer(0)
    assert layer.k[0].any() and not layer.k[1:].any() and not layer.v[1:].any()
    assert (slots.last_token[:-1] == 99).all()

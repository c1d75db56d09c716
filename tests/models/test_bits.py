"""On the CPU a token's logits have the same bits however its sequence is fed and whoever shares its steps.

That is so in float32 everywhere, and in bfloat16 where the processor's products keep the bits of rows.
"""

from __future__ import annotations

import pytest
import torch

from lmdeploy.ops.cpu import features
from tests.models.driver import Driver, load_model
from tests.models.test_logits import tokens
from tests.models.tiny import ARCHITECTURES

LENGTH = 330  # more than one span of keys
DTYPES = [torch.float32] + ([torch.bfloat16] if features.stable_rows(torch.bfloat16) else [])


@pytest.fixture(scope='module', params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_chunks_of_any_size(tiny, arch, dtype):
    driver = Driver(load_model(tiny(arch), dtype), dtype=dtype)
    ids = tokens(1, LENGTH)
    whole = driver.sequence(ids)
    for chunk in (1, 7, 64, 100, 256) if arch in ('Qwen2ForCausalLM', 'Gemma3ForCausalLM') else (50,):
        assert torch.equal(driver.sequence(ids, chunk), whole), chunk


@pytest.mark.parametrize('arch', ['Qwen2ForCausalLM', 'Gemma3ForCausalLM'])
def test_neighbours_blocks_and_padding(tiny, arch, dtype):
    model = load_model(tiny(arch), dtype)
    ids = tokens(1, LENGTH)
    whole = Driver(model, dtype=dtype).sequence(ids)
    driver = Driver(model, dtype=dtype, free=[9, 3, 60, 1, 7, 2, 44, 30, *range(45, 60), *range(10, 30), 4, 5, 6])
    row, others = driver.row(), [driver.row() for _ in range(16)]
    found, fed = [], 0
    for step, size in enumerate((100, 1, 1, 37, 1, 150, 1, 1)):
        guests = others[: (3, 0, 15, 1, 7, 2, 16, 5)[step]]
        work = [(guest, tokens(step * 20 + i, 1 + 5 * (i + step) % 23)) for i, guest in enumerate(guests)]
        place = len(work) // 2
        work.insert(place, (row, ids[fed : fed + size]))
        found.append(driver.step(work, padding=step % 3)[place])
        fed += size
    assert torch.equal(torch.cat(found), whole[:fed])


@pytest.mark.parametrize('block_size', [128, 320])
def test_larger_blocks(tiny, block_size):
    model = load_model(tiny('Qwen2ForCausalLM'))
    ids = tokens(1, LENGTH)
    found = Driver(model, 8, block_size).sequence(ids, 77)
    assert torch.equal(found, Driver(model).sequence(ids))


def test_stale_blocks_of_a_failed_request_do_not_matter(tiny):
    driver = Driver(load_model(tiny('Qwen2ForCausalLM')), num_blocks=6)
    ids = tokens(1, 100)
    whole = driver.sequence(ids)
    healthy = driver.model.embedding.weight
    driver.model.embedding.weight = torch.full_like(healthy, float('nan'))
    assert driver.sequence(tokens(2, 384)).isnan().all()
    driver.model.embedding.weight = healthy
    assert torch.equal(driver.sequence(ids), whole)

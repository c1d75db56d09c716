"""The formulas of the roofline against figures that were computed by hand, for one H200: 4.3 TB/s, 790 TFLOP/s."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lmdeploy.bench import shapes
from lmdeploy.bench.roofline import ModelCost, Roof, decode_seconds, first_token_seconds, prompt_seconds, run_seconds
from lmdeploy.config.model import ModelConfig
from lmdeploy.errors import SourceError

H200 = Roof(4.3e12, 790e12, attention=600e12)


def config(name: str) -> ModelConfig:
    path = shapes.find(f'shapes:{name}')
    assert path is not None
    return ModelConfig.from_dict(json.loads(path.read_text()))


def cost(name: str, **widths: float) -> ModelCost:
    return ModelCost.of(config(name), **widths)


def test_parameters_and_bytes_of_known_models():
    llama, internlm, qwen = (cost(name) for name in ('llama3-8b', 'internlm3-8b', 'qwen2.5-0.5b'))
    assert round(llama.linear / 1e9, 2) == 6.98 and round(llama.head / 1e9, 2) == 0.53
    assert round(internlm.linear / 1e9, 2) == 7.75 and round(qwen.linear / 1e9, 2) == 0.36
    assert [one.kv_bytes * len(one.windows) for one in (llama, internlm, qwen)] == [131_072, 49_152, 12_288]


@pytest.mark.parametrize('name, rows, context, milliseconds', [
    ('llama3-8b', 1, 1024, 3.52), ('llama3-8b', 16, 1024, 3.99), ('llama3-8b', 64, 1024, 5.49),
    ('llama3-8b', 256, 1024, 12.85), ('llama3-8b', 1, 4096, 3.62), ('llama3-8b', 256, 4096, 36.83),
    ('internlm3-8b', 1, 1024, 3.86), ('internlm3-8b', 256, 1024, 8.36), ('internlm3-8b', 64, 4096, 6.85)])  # fmt: skip
def test_decode_step_in_bf16(name, rows, context, milliseconds):
    assert 1000 * decode_seconds(cost(name), H200, rows, context) == pytest.approx(milliseconds, abs=0.006)


def test_decode_step_of_narrower_weights_and_cache():
    narrow = cost('llama3-8b', weight_bytes=1.0, kv_bytes=1.03, head_bytes=2.0)
    assert 1000 * decode_seconds(narrow, replace(H200, peak=1e18), 1, 1024) == pytest.approx(1.88, abs=0.006)


@pytest.mark.parametrize('name, tokens, per_second', [
    ('llama3-8b', 1024, 55.2e3), ('llama3-8b', 4096, 51.4e3), ('llama3-8b', 16384, 40.3e3),
    ('internlm3-8b', 1024, 49.3e3), ('internlm3-8b', 16384, 32.9e3), ('qwen2.5-0.5b', 4096, 834e3)])  # fmt: skip
def test_prompt(name, tokens, per_second):
    assert tokens / prompt_seconds(cost(name), H200, tokens) == pytest.approx(per_second, rel=0.003)


def test_first_token_is_bound_by_products_or_by_the_weights():
    llama = cost('llama3-8b')
    assert 1000 * first_token_seconds(llama, H200, 1024) == pytest.approx(18.6, abs=0.06)
    assert 1000 * first_token_seconds(llama, H200, 128) == pytest.approx(3.5, abs=0.02)


def test_a_run_of_equal_requests_is_its_prompts_and_its_steps():
    llama = cost('llama3-8b')
    rows, given, made = 560, 1000, 1000
    whole = run_seconds(llama, H200, [given] * rows, [made] * rows, rows)
    by_hand = rows * prompt_seconds(llama, H200, given) + sum(
        decode_seconds(llama, H200, rows, given + i) for i in range(1, made))
    assert whole == pytest.approx(by_hand, rel=1e-9)
    assert rows * made / whole == pytest.approx(12_073, rel=0.003)


def test_a_run_is_never_faster_than_its_longest_answer_or_its_rows():
    llama = cost('llama3-8b')
    one = run_seconds(llama, H200, [8, 8], [1, 500], 2)
    assert one > 499 * decode_seconds(llama, H200, 1, 8)
    few, many = (run_seconds(llama, H200, [8] * 64, [100] * 64, rows) for rows in (1, 64))
    assert few > 30 * many
    assert run_seconds(llama, H200, [8], [1], 1) == first_token_seconds(llama, H200, 8)


def test_windows_cap_what_is_read():
    windowed = replace(cost('llama3-8b'), windows=(0, 10))
    assert windowed.seen(4) == 8 and windowed.seen(100) == 110
    assert windowed.seen_between(5, 30) == sum(windowed.seen(n) for n in range(5, 31))
    assert windowed.seen_between(20, 30) == sum(windowed.seen(n) for n in range(20, 31))
    assert windowed.seen_between(5, 4) == 0


def test_shapes_that_there_are_and_are_not():
    assert shapes.names() == ['internlm3-8b', 'internvl3-1b', 'internvl3-8b', 'llama3-8b', 'qwen2.5-0.5b']
    assert shapes.find('llama3-8b') is None
    with pytest.raises(SourceError) as error:
        shapes.find('shapes:llama9')
    assert error.value.code == 'LMD-590' and 'shapes:llama3-8b' in error.value.text('en')

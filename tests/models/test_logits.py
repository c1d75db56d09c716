"""Our logits are transformers' logits, for every architecture and the variants of its config."""

from __future__ import annotations

import pytest
import torch

from tests.models.driver import Driver, load_model
from tests.models.tiny import ARCHITECTURES, VOCAB, load_reference

VARIANTS = [
    ('LlamaForCausalLM', {'attention_bias': True, 'mlp_bias': True, 'rope_parameters': None}),
    ('LlamaForCausalLM', {'num_key_value_heads': 6, 'tie_word_embeddings': True, 'head_dim': None}),
    ('Qwen2ForCausalLM', {'use_sliding_window': True, 'sliding_window': 20, 'max_window_layers': 1}),
    ('Qwen3ForCausalLM', {'attention_bias': True, 'head_dim': 64, 'num_key_value_heads': 1}),
    ('MistralForCausalLM', {'sliding_window': None}),
    ('InternLM2ForCausalLM', {'num_key_value_heads': 3}),
    ('InternLM2ForCausalLM', {'attention_bias': True}),
    ('InternLM3ForCausalLM', {'mlp_bias': True, 'attention_bias': True}),
    ('Gemma3ForCausalLM', {'attention_bias': True, 'sliding_window': 300, 'num_key_value_heads': 3}),
]


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def wanted_logits(reference, ids: list[int]) -> torch.Tensor:
    return reference(torch.tensor([ids])).logits[0]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(('arch', 'overrides'), [(arch, {}) for arch in ARCHITECTURES] + VARIANTS)
def test_logits_equal_transformers(tiny, arch, overrides):
    folder = tiny(arch, **overrides)
    ids = tokens(1, 330)
    assert_close(Driver(load_model(folder)).sequence(ids), wanted_logits(load_reference(folder), ids))


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_rows_of_unequal_lengths_in_mixed_steps(tiny, arch):
    folder = tiny(arch)
    reference, driver = load_reference(folder), Driver(load_model(folder))
    prompts = [tokens(2, 5), tokens(3, 90), tokens(4, 33), tokens(5, 1)]
    rows = [driver.row() for _ in prompts]
    found = [[] for _ in prompts]
    fed = [0] * len(prompts)
    for sizes in ([5, 17, 0, 1], [0, 40, 33, 0], [0, 33, 0, 0]):  # chunks of some rows beside others' whole prompts
        work = [i for i, size in enumerate(sizes) if size]
        outs = driver.step([(rows[i], prompts[i][fed[i] : fed[i] + sizes[i]]) for i in work])
        for i, out in zip(work, outs):
            found[i].append(out)
            fed[i] += sizes[i]
    for prompt, out in zip(prompts, found):
        assert_close(torch.cat(out), wanted_logits(reference, prompt))


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_greedy_tokens_over_32_steps(tiny, arch):
    folder = tiny(arch)
    reference, driver = load_reference(folder), Driver(load_model(folder))
    prompts = [tokens(6, 3), tokens(7, 60), tokens(8, 29)]
    wanted = [reference.generate(torch.tensor([p]), max_new_tokens=32, do_sample=False, eos_token_id=None)[0, len(p) :]
              .tolist() for p in prompts]  # fmt: skip
    rows = [driver.row() for _ in prompts]
    answers, feed = [[] for _ in prompts], prompts
    for _ in range(32):
        outs = driver.step(list(zip(rows, feed)))
        feed = [[int(out[-1].argmax())] for out in outs]
        for answer, ids in zip(answers, feed):
            answer += ids
    assert answers == wanted


def test_text_part_of_a_vision_language_checkpoint(tiny, tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    folder = tiny('Gemma3ForCausalLM')
    config = json.loads((folder / 'config.json').read_text())
    outer = {'architectures': ['Gemma3ForConditionalGeneration'], 'model_type': 'gemma3', 'text_config': config}
    tensors = {f'language_model.{name}': t for name, t in load_file(folder / 'model.safetensors').items()}
    tensors['vision_tower.patch.weight'] = torch.zeros(3)
    (tmp_path / 'config.json').write_text(json.dumps(outer))
    save_file(tensors, tmp_path / 'model.safetensors')
    ids = tokens(9, 40)
    assert torch.equal(Driver(load_model(tmp_path)).sequence(ids), Driver(load_model(folder)).sequence(ids))


def test_tokens_without_outputs_leave_their_keys_and_values(tiny):
    folder = tiny('Qwen3ForCausalLM')
    ids = tokens(3, 50)
    driver = Driver(load_model(folder))
    row = driver.row()
    batch = driver.batch([(row, ids[:40])])
    batch.output_rows = batch.output_rows[:0]
    assert driver.model(batch, driver.kv).shape == (0, driver.model.config.hidden_size)
    batch = driver.batch([(row, ids[40:])])
    batch.output_rows = batch.output_rows[[9, 2]]
    found = driver.model.logits(driver.model(batch, driver.kv))
    assert_close(found, wanted_logits(load_reference(folder), ids)[[49, 42]])

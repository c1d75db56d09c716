"""A real model against transformers loading the very same file: same tokens, in Chinese, English and code."""

from __future__ import annotations

import pytest
import torch

from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline

pytestmark = pytest.mark.real

PROMPTS = [
    '你好,请介绍一下你自己',
    '用一句话解释什么是量子计算。',
    '写一首关于秋天的五言诗。',
    '请列出三种常见的排序算法,并说明它们的时间复杂度。',
    'Give three suggestions about time management.',
    'What is the capital of France, and what is it known for?',
    'Explain the difference between a process and a thread.',
    'Write a Python function that returns the n-th Fibonacci number.',
    'def quicksort(xs):\n    """Sort a list."""\n',
    'SELECT name FROM users WHERE age > 30; -- explain this query 🙂',
]
NEW = 64


@pytest.fixture(scope='module')
def oracle(qwen_coder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen_coder.parent, gguf_file=qwen_coder.name)
    model = AutoModelForCausalLM.from_pretrained(qwen_coder.parent, gguf_file=qwen_coder.name, dtype=torch.float32)
    return tokenizer, model.eval()


@pytest.fixture(scope='module')
def answers(qwen_coder):
    """Our greedy answers to all prompts, in one batch, and the tokenizer's end tokens."""
    config = PytorchEngineConfig(dtype='float32', session_len=1024, max_batch_size=10)
    with pipeline(str(qwen_coder), config) as pipe:
        return pipe(PROMPTS, gen_config=GenerationConfig(max_new_tokens=NEW)), set(pipe.tokenizer.eos_token_ids)


def encode(tokenizer, prompt: str) -> torch.Tensor:
    text = tokenizer.apply_chat_template([{'role': 'user', 'content': prompt}], tokenize=False,
                                         add_generation_prompt=True)
    return tokenizer(text, return_tensors='pt', add_special_tokens=False).input_ids


@torch.inference_mode()
def test_every_token_is_the_one_that_transformers_finds_most_likely(answers, oracle):
    """One forward over prompt and answer checks all of its tokens, the end token included."""
    tokenizer, model = oracle
    responses, ends = answers
    for prompt, answer in zip(PROMPTS, responses):
        ids = encode(tokenizer, prompt)
        assert answer.input_token_len == ids.shape[1]
        whole = torch.cat([ids, torch.tensor([answer.token_ids])], 1)
        best = model(whole).logits[0, ids.shape[1] - 1:].argmax(-1).tolist()
        assert best[:-1] == answer.token_ids, prompt
        assert (answer.finish_reason == 'stop') == (best[-1] in ends) or len(answer.token_ids) == NEW


@torch.inference_mode()
@pytest.mark.parametrize('prompt', [PROMPTS[0], PROMPTS[8]])
def test_the_same_tokens_as_generate(prompt, answers, oracle):
    tokenizer, model = oracle
    responses, ends = answers
    ids = encode(tokenizer, prompt)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                         repetition_penalty=1.0, pad_token_id=0)
    expected = [t for t in out[0, ids.shape[1]:].tolist() if t not in ends]
    assert responses[PROMPTS.index(prompt)].token_ids == expected

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


def test_the_same_tokens_as_transformers(qwen_coder, oracle):
    tokenizer, model = oracle
    expected, rendered = [], []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template([{'role': 'user', 'content': prompt}], tokenize=False,
                                             add_generation_prompt=True)
        ids = tokenizer(text, return_tensors='pt', add_special_tokens=False).input_ids
        rendered.append(ids[0].tolist())
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                                 repetition_penalty=1.0, pad_token_id=0)
        answer = out[0, ids.shape[1]:].tolist()
        expected.append(answer)
    config = PytorchEngineConfig(dtype='float32', session_len=1024, max_batch_size=10)
    with pipeline(str(qwen_coder), config) as pipe:
        answers = pipe(PROMPTS, gen_config=GenerationConfig(max_new_tokens=NEW))
        ends = set(pipe.tokenizer.eos_token_ids)
        for prompt, answer, ids, tokens in zip(PROMPTS, answers, rendered, expected):
            assert answer.input_token_len == len(ids)
            assert answer.token_ids == [t for t in tokens if t not in ends], prompt

"""A complete model folder that is tiny: random Qwen2 weights, a byte-level BPE tokenizer, a ChatML template."""

from __future__ import annotations

import json
from pathlib import Path

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
          "'<|im_end|>' + '\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
SPECIALS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
TEXT = ['the quick brown fox jumps over the lazy dog', 'def f(x):\n    return x + 1\n', '你好,世界', 'time management',
        'one two three four five six seven eight nine ten']


def write_tokenizer(folder: Path) -> int:
    """tokenizer.json and its config in ``folder``; returns the vocabulary's size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({
        'tokenizer_class': 'Qwen2Tokenizer', 'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>',
        'add_bos_token': False, 'chat_template': CHATML}))
    return tokenizer.get_vocab_size(with_added_tokens=True)


def write_model(folder: Path, seed: int = 0, **overrides: object) -> Path:
    """A model that loads and answers (nonsense): config.json, model.safetensors, tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(folder)
    options = {'vocab_size': vocab_size, 'hidden_size': 64, 'intermediate_size': 96, 'num_hidden_layers': 2,
               'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 512,
               'tie_word_embeddings': False, 'bos_token_id': None, 'eos_token_id': 2 + vocab_size - 3}
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**(options | overrides)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2 if parameter.dim() > 1 else 0.5)
    model.save_pretrained(folder)
    return folder

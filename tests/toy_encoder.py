"""A complete folder of an embedding model that is tiny: random weights, a WordPiece tokenizer, pooling modules."""

from __future__ import annotations

import json
from pathlib import Path

SPECIALS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
TEXT = ['the quick brown fox jumps over the lazy dog', 'time management', 'one two three four five six seven eight']
SHAPE = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 48,
         'max_position_embeddings': 40}
MODULES = {'Transformer': '', 'Pooling': '1_Pooling', 'Normalize': '2_Normalize'}


def write_word_pieces(folder: Path) -> int:
    """tokenizer.json and its config; returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token='[UNK]'))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIALS,
                                                                  show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]', pair='[CLS] $A [SEP] $B [SEP]',
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ('[CLS]', '[SEP]')])
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({
        'tokenizer_class': 'BertTokenizer', 'cls_token': '[CLS]', 'sep_token': '[SEP]', 'pad_token': '[PAD]',
        'unk_token': '[UNK]', 'mask_token': '[MASK]'}))
    return tokenizer.get_vocab_size(with_added_tokens=True)


def write_modules(folder: Path, *names: str, mode: str = 'mean_tokens', most: int | None = None) -> None:
    """The files that say how hidden states are pooled."""
    (folder / 'modules.json').write_text(json.dumps([
        {'idx': i, 'name': str(i), 'path': MODULES.get(name, name), 'type': f'sentence_transformers.models.{name}'}
        for i, name in enumerate(names)]))
    (folder / '1_Pooling').mkdir(exist_ok=True)
    (folder / '1_Pooling' / 'config.json').write_text(json.dumps({
        'word_embedding_dimension': SHAPE['hidden_size'],
        **{f'pooling_mode_{name}': name == mode for name in ('cls_token', 'mean_tokens', 'max_tokens')}}))
    if most is not None:
        (folder / 'sentence_bert_config.json').write_text(json.dumps({'max_seq_length': most}))


def write_encoder(folder: Path, kind: str = 'Bert', head: str = 'Model', seed: int = 0, **overrides: object) -> Path:
    """config.json, model.safetensors, tokenizer. ``kind`` and ``head`` name a class of transformers."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    options = SHAPE | {'vocab_size': write_word_pieces(folder)} | overrides
    torch.manual_seed(seed)
    model = getattr(transformers, f'{kind}{head}')(getattr(transformers, f'{kind}Config')(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2 if parameter.dim() > 1 else 0.5)
    model.save_pretrained(folder)
    return folder

"""Tiny vocabularies of every kind, trained on the spot."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.tokenizer.corpus import plain_lines

SPECIALS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
MARKUP = ('<tool_call>', '</tool_call>', '<think>')
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r'|\s+(?!\S)|\s+')
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), encoding='utf-8')


@lru_cache
def byte_level_json(normalizer: str = 'NFC') -> str:
    """A trained tokenizer.json in the manner of Qwen2: 3 special tokens, 3 markup tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = getattr(normalizers, normalizer)()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_SPLIT), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(plain_lines(400), trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])
    return tokenizer.to_str()


def write_qwen2(folder: Path, **config: object) -> Path:
    """A folder with a byte-level tokenizer.json and the files beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'tokenizer.json').write_text(byte_level_json(), encoding='utf-8')
    write_json(folder / 'config.json', {'model_type': 'qwen2', 'vocab_size': 1024})
    write_json(folder / 'tokenizer_config.json', {
        'tokenizer_class': 'Qwen2Tokenizer', 'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>',
        'add_bos_token': False, 'chat_template': CHATML} | config)
    return folder


def byte_level_metadata(pre: str = 'qwen2') -> dict[str, Any]:
    """The same vocabulary as GGUF metadata write it."""
    data = json.loads(byte_level_json())
    vocab = data['model']['vocab'] | {token['content']: token['id'] for token in data['added_tokens']}
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = {**dict.fromkeys(SPECIALS, 3), **dict.fromkeys(MARKUP, 4)}
    return {
        'general.architecture': 'qwen2', 'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': pre,
        'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.token_type': [kinds.get(token, 1) for token in tokens],
        'tokenizer.ggml.merges': [' '.join(merge) for merge in data['model']['merges']],
        'tokenizer.ggml.eos_token_id': vocab['<|im_end|>'], 'tokenizer.ggml.add_bos_token': False,
        'tokenizer.chat_template': CHATML}


@lru_cache
def spm_bytes(vocab_size: int = 1600, prefix: bool = True, user_defined: tuple[str, ...] = ()) -> bytes:
    """A SentencePiece BPE model trained as Llama's was: byte fallback, single digits, no normalisation."""
    import sentencepiece

    lines = [line for text in plain_lines(800) for line in text.replace('\0', '').splitlines() if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, model_type='bpe', byte_fallback=True,
        character_coverage=0.98, normalization_rule_name='identity', remove_extra_whitespaces=False,
        add_dummy_prefix=prefix, split_digits=True, allow_whitespace_only_pieces=True,
        user_defined_symbols=list(user_defined), num_threads=1, minloglevel=2)
    return model.getvalue()


def write_llama(folder: Path, **config: object) -> Path:
    """A folder with a tokenizer.model and the files beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'tokenizer.model').write_bytes(spm_bytes())
    write_json(folder / 'config.json', {'model_type': 'llama', 'vocab_size': 2048})
    write_json(folder / 'tokenizer_config.json', {
        'tokenizer_class': 'LlamaTokenizer', 'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>',
        'add_bos_token': True, 'legacy': False} | config)
    return folder


def llama_json(prepend: bool) -> str:
    """The same model as a converted tokenizer.json; ``prepend``: in the older style, with normalizers."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    processor = sentencepiece.SentencePieceProcessor(model_proto=spm_bytes())
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [(processor.get_score(i), left, right) for i, piece in enumerate(pieces) for cut in range(1, len(piece))
              if (left := piece[:cut]) in vocab and (right := piece[cut:]) in vocab]
    merges.sort(key=lambda merge: (-merge[0], len(merge[1]), len(merge[2])))
    tokenizer = Tokenizer(models.BPE(vocab, [(a, b) for _, a, b in merges], unk_token='<unk>', fuse_unk=True,
                                     byte_fallback=True))
    if prepend:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ('<unk>', '<s>', '</s>')])
    tokenizer.post_processor = processors.TemplateProcessing('<s> $A', '<s> $A <s> $B', [('<s>', 1)])
    return tokenizer.to_str()


def spm_metadata(model: bytes) -> dict[str, Any]:
    """A SentencePiece model as GGUF metadata write it."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    kinds = [2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
             for i in ids]
    return {
        'general.architecture': 'llama', 'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.token_type': kinds,
        'tokenizer.ggml.tokens': [processor.id_to_piece(i) for i in ids],
        'tokenizer.ggml.scores': [processor.get_score(i) for i in ids],
        'tokenizer.ggml.bos_token_id': 1, 'tokenizer.ggml.eos_token_id': 2, 'tokenizer.ggml.unknown_token_id': 0}

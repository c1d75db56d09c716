"""Ids and texts beside transformers' own classes, on files of every kind."""

from __future__ import annotations

import json

import pytest

from lmdeploy.tokenizer import Tokenizer
from tests.tokenizer import vocabularies
from tests.tokenizer.corpus import lines
from tests.tokenizer.vocabularies import write_json, write_llama, write_qwen2


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')


def oracle(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def llama2(folder, **config):
    write_llama(folder, **config)
    (folder / 'tokenizer.json').write_text(vocabularies.llama_json(prepend=True), encoding='utf-8')
    return folder


def llama3(folder):
    """Byte-level, whole words before merges, bos from the post-processor, a class without rules of its own."""
    write_qwen2(folder, tokenizer_class='PreTrainedTokenizerFast', bos_token='<|im_start|>')
    data = json.loads((folder / 'tokenizer.json').read_text())
    data['normalizer'] = None
    data['model']['ignore_merges'] = True
    bos = next(t['id'] for t in data['added_tokens'] if t['content'] == '<|im_start|>')
    data['post_processor'] = {
        'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': '<|im_start|>', 'type_id': 0}},
                                                 {'Sequence': {'id': 'A', 'type_id': 0}}],
        'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 1}}],
        'special_tokens': {'<|im_start|>': {'id': '<|im_start|>', 'ids': [bos], 'tokens': ['<|im_start|>']}}}
    write_json(folder / 'tokenizer.json', data)
    config = json.loads((folder / 'tokenizer_config.json').read_text())
    del config['add_bos_token']
    write_json(folder / 'tokenizer_config.json', config)
    write_json(folder / 'config.json', {'model_type': 'llama', 'vocab_size': 1024})
    return folder


def gemma(folder):
    """SentencePiece pieces, spaces by a normalizer, no prefix space, white space as added tokens."""
    write_llama(folder, tokenizer_class='GemmaTokenizer', pad_token='<unk>', mask_token='<s>')
    write_json(folder / 'config.json', {'model_type': 'gemma3_text', 'vocab_size': 2048})
    data = json.loads(vocabularies.llama_json(prepend=False))
    data['normalizer'] = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '\u2581'}
    data['pre_tokenizer'] = {'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'MergedWithPrevious',
                             'invert': False}
    data['decoder']['decoders'].pop()
    write_json(folder / 'tokenizer.json', data)
    return folder


def extra_tokens(folder):
    """Tokens that only tokenizer_config.json knows, with their flags."""
    own = json.loads(vocabularies.byte_level_json())['added_tokens']
    declared = {str(token['id']): {k: v for k, v in token.items() if k != 'id'} for token in own}
    base = own[-1]['id'] + 1
    flags = {'lstrip': False, 'rstrip': False, 'normalized': False, 'single_word': False}
    declared[str(base)] = flags | {'content': '<|plain|>', 'special': False, 'rstrip': True}
    declared[str(base + 1)] = flags | {'content': '<|left|>', 'special': True, 'lstrip': True}
    return write_qwen2(folder, extra_special_tokens=['<|extra|>'], added_tokens_decoder=declared)


FOLDERS = {
    'qwen2': write_qwen2,
    'llama2 tokenizer.json': llama2,
    'llama2 tokenizer.json, legacy': lambda folder: llama2(folder, legacy=True),
    'llama3': llama3,
    'gemma': gemma,
    'extra tokens': extra_tokens,
    'tokenizer.json of another class': lambda folder: llama2(folder, tokenizer_class='PreTrainedTokenizerFast'),
}
EXTRA = ['a <|plain|>  b', 'a  <|left|> b', '<|extra|>x', '<|plain|><|left|>', ' <|left|>\n<|plain|>\n\n']


@pytest.mark.parametrize('name', FOLDERS)
def test_tokenizer_json(name, tmp_path):
    folder = FOLDERS[name](tmp_path / 'model')
    ours, theirs = Tokenizer(str(folder)), oracle(folder)
    for line in [*lines(800), *EXTRA]:
        ids = theirs.encode(line)
        assert ours.encode(line) == ids
        assert ours.encode(line, add_special_tokens=False) == theirs.encode(line, add_special_tokens=False)
        assert ours.encode_segments([(line, True)], add_bos=False) == theirs.encode(line, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.chat_template == theirs.chat_template
    assert ours.special_ids == set(theirs.all_special_ids) | {
        i for i, token in theirs.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize('name', ['qwen2', 'llama2 tokenizer.json', 'gemma', 'llama3', 'extra tokens'])
def test_cutting_at_control_tokens_changes_nothing_else(name, tmp_path):
    """The way taken under attack, on lines without one: the same ids as the library's own matching."""
    from lmdeploy.tokenizer.segments import compose, find_anchors

    tokenizer = Tokenizer(str(FOLDERS[name](tmp_path / 'model')))
    encoder = tokenizer._segments
    for line in [*lines(600), *EXTRA]:
        anchors = find_anchors(encoder._control, encoder.control, line, 0, len(line))
        assert compose(tokenizer.vocabulary, line, anchors) == tokenizer.encode(line, add_special_tokens=False)


def test_tokenizer_model(tmp_path):
    """transformers 5 rebuilds the model with a prefix rule that adds no space before text that starts with one, so
    such lines differ there (SentencePiece itself, hence Llama 2, adds it); all others are the same."""
    import sentencepiece

    folder = write_llama(tmp_path / 'model')
    ours, theirs = Tokenizer(str(folder)), oracle(folder)
    itself = sentencepiece.SentencePieceProcessor(model_proto=vocabularies.spm_bytes())
    same = 0
    for line in lines(1500):
        if not line.startswith((' ', '\u2581')):
            same += 1
            assert ours.encode(line) == theirs.encode(line)
        if not any(token in line for token in ours.added_tokens):
            assert ours.encode(line, add_special_tokens=False) == itself.encode(line)
        ids = theirs.encode(line)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert same > 1000


@pytest.mark.parametrize('legacy', [True, False])
def test_prefix_space_after_special_tokens(tmp_path, legacy):
    """``legacy``: text after a special token gets the prefix space too."""
    tokenizer = Tokenizer(str(write_llama(tmp_path / str(legacy), legacy=legacy)))
    pieces = [tokenizer.token_piece(i) for i in tokenizer.encode('</s>the', add_bos=False)]
    assert pieces[0] == '</s>'
    assert pieces[1].startswith('\u2581') is legacy

"""The public class: what the files around a vocabulary say, lookups, and files that cannot be used."""

from __future__ import annotations

import builtins
import json
import logging
import subprocess
import sys

import pytest

from lmdeploy.errors import LoadError
from lmdeploy.tokenizer import Tokenizer
from tests.tokenizer.vocabularies import CHATML, write_json, write_llama, write_qwen2


def test_importing_the_package_loads_nothing_heavy():
    code = ('import sys, lmdeploy.tokenizer; print([m for m in ("torch", "transformers", "tokenizers", "sentencepiece",'
            ' "numpy") if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'


def test_loading_needs_neither_torch_nor_transformers(tmp_path):
    code = ('import sys; from lmdeploy.tokenizer import Tokenizer; Tokenizer(sys.argv[1]).encode("hi"); '
            'print([m for m in ("torch", "transformers", "sentencepiece") if m in sys.modules])')
    run = subprocess.run([sys.executable, '-c', code, str(write_qwen2(tmp_path / 'q'))], capture_output=True, text=True)
    assert run.stdout == '[]\n', run.stderr


def test_end_tokens_come_from_all_files(tmp_path):
    folder = write_qwen2(tmp_path / 'q')
    end, start = Tokenizer(str(folder)).eos_token_id, Tokenizer(str(folder)).special_tokens['<|endoftext|>']
    write_json(folder / 'generation_config.json', {'eos_token_id': [end, start]})
    assert Tokenizer(str(folder)).eos_token_ids == {end, start}
    write_json(folder / 'generation_config.json', {'eos_token_id': start})
    write_json(folder / 'config.json', {'vocab_size': 1024, 'eos_token_id': 7})
    assert Tokenizer(str(folder)).eos_token_ids == {end, start, 7}
    write_qwen2(folder, eos_token=None)
    assert Tokenizer(str(folder)).eos_token_id == start


def test_special_tokens_map_fills_in(tmp_path):
    folder = write_qwen2(tmp_path / 'q', eos_token=None)
    write_json(folder / 'special_tokens_map.json', {'eos_token': {'content': '<|im_end|>', 'lstrip': False}})
    tokenizer = Tokenizer(str(folder))
    assert tokenizer.eos_token_id == tokenizer.special_tokens['<|im_end|>']


@pytest.mark.parametrize(('config', 'files', 'expected'), [
    ({}, {}, {'default': CHATML}),
    ({'chat_template': [{'name': 'default', 'template': 'D'}, {'name': 'tool_use', 'template': 'T'}]}, {},
     {'default': 'D', 'tool_use': 'T'}),
    ({}, {'chat_template.jinja': 'J'}, {'default': 'J'}),
    ({'chat_template': None}, {'chat_template.json': '{"chat_template": "P"}'}, {'default': 'P'}),
    ({}, {'additional_chat_templates/tool_use.jinja': 'T'}, {'default': CHATML, 'tool_use': 'T'}),
    ({'chat_template': None}, {}, {}),
])
def test_chat_templates(tmp_path, config, files, expected):
    folder = write_qwen2(tmp_path / 'q', **config)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    tokenizer = Tokenizer(str(folder))
    assert tokenizer.chat_templates == expected
    assert tokenizer.chat_template == expected.get('default')


def test_bos_and_eos_around_a_text(tmp_path):
    both = Tokenizer(str(write_llama(tmp_path / 'a', add_eos_token=True)))
    ids = both.encode('hi')
    assert (ids[0], ids[-1]) == (both.bos_token_id, both.eos_token_id)
    assert both.encode('hi', add_bos=False) == ids[1:]
    assert both.encode('hi', add_special_tokens=False) == ids[1:-1]
    assert both.encode_segments([('hi', False)], add_bos=True) == ids[:-1]


def test_token_bytes_and_pieces(tokenizers):
    byte_level, spm = tokenizers['qwen2'], tokenizers['llama']
    ids = byte_level.encode(' é')
    assert b''.join(map(byte_level.token_bytes, ids)) == ' é'.encode()
    assert byte_level.token_piece(ids[0]).startswith('Ġ')
    newline = spm.encode('a\n', add_bos=False)[-1]
    assert (spm.token_piece(newline), spm.token_bytes(newline)) == ('<0x0A>', b'\n')
    assert (spm.token_bytes(10**9), spm.token_piece(10**9), spm.token_bytes(-1)) == (b'', '', b'')


def test_indexes_containing_token(tokenizers, caplog):
    tokenizer = tokenizers['qwen2']
    assert tokenizer.indexes_containing_token('<|im_end|>') == [tokenizer.eos_token_id]
    containing = [i for i in range(tokenizer.vocab_size) if 'a' in tokenizer.decode([i], skip_special_tokens=False)]
    assert len(containing) > 5
    assert tokenizer.indexes_containing_token('a') == [i for i in containing if tokenizer.decode([i]) == 'a']
    logger = logging.getLogger('lmdeploy')
    logger.addHandler(caplog.handler)
    try:
        assert tokenizer.indexes_containing_token('no token is this') == []
    finally:
        logger.removeHandler(caplog.handler)
    assert 'no token is this' in caplog.text


def remove(name):
    return lambda folder: (folder / name).unlink()


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def config(**values):
    return lambda folder: write_qwen2(folder, **values)


def only_code(folder):
    (folder / 'tokenizer.json').unlink()
    (folder / 'tokenization_x.py').write_text('raise SystemExit("executed")')


@pytest.mark.parametrize(('edit', 'message'), [
    (remove('tokenizer.json'), 'LMD-150'),
    (only_code, r'LMD-158.*tokenization_x\.py'),
    (text('tokenizer.json', ''), r'LMD-151.*tokenizer\.json'),
    (text('tokenizer.json', '{"version": "1.0"}'), 'LMD-151'),
    (text('tokenizer.json', '{"version": "1.0", "model": null}'), 'LMD-151'),
    (text('tokenizer.json', b'\xff\xfe'), 'LMD-151'),
    (text('tokenizer.json', '[' * 100_000), 'LMD-151'),
    (text('tokenizer_config.json', '{'), r'LMD-151.*tokenizer_config\.json'),
    (text('tokenizer_config.json', '[]'), 'LMD-151.*list'),
    (text('tokenizer_config.json', '[' * 100_000), 'LMD-151'),
    (text('chat_template.jinja', b'\xff'), r'LMD-151.*chat_template\.jinja'),
    (text('generation_config.json', '{"eos_token_id": "x"}'), r'LMD-152.*generation_config\.json.*eos_token_id'),
    (text('generation_config.json', '{"eos_token_id": [1, null]}'), 'LMD-152.*eos_token_id'),
    (text('generation_config.json', '{"eos_token_id": 1000000000}'), 'LMD-153.*1000000000'),
    (text('config.json', '{"vocab_size": "many"}'), 'LMD-152.*vocab_size'),
    (text('config.json', '{"vocab_size": 16}'), 'LMD-153.*16'),
    (config(eos_token=3), 'LMD-152.*eos_token'),
    (config(eos_token={'content': None}), 'LMD-152.*eos_token'),
    (config(add_bos_token='yes'), 'LMD-152.*add_bos_token'),
    (config(chat_template=3), 'LMD-152.*chat_template'),
    (config(chat_template=[{'name': 'x'}]), 'LMD-152.*chat_template'),
    (config(added_tokens_decoder=[1]), 'LMD-152.*added_tokens_decoder'),
    (config(added_tokens_decoder={'x': {'content': 'y'}}), 'LMD-152.*added_tokens_decoder'),
    (config(added_tokens_decoder={'5': {'content': 6}}), 'LMD-152.*content'),
    (config(extra_special_tokens=[1]), 'LMD-152.*extra_special_tokens'),
    (config(tokenizer_class=1), 'LMD-152.*tokenizer_class'),
])
def test_unusable_files_are_named(tmp_path, edit, message):
    folder = write_qwen2(tmp_path / 'q')
    edit(folder)
    with pytest.raises(LoadError, match=message):
        Tokenizer(str(folder))


def test_unknown_decoders_are_refused(tmp_path):
    folder = write_qwen2(tmp_path / 'q')
    data = json.loads((folder / 'tokenizer.json').read_text())
    data['decoder'] = {'type': 'CTC', 'pad_token': '', 'word_delimiter_token': '|', 'cleanup': False}
    write_json(folder / 'tokenizer.json', data)
    with pytest.raises(LoadError, match='LMD-161.*CTC'):
        Tokenizer(str(folder))


@pytest.mark.parametrize('part', [
    {'model': {'type': 'BPE', 'vocab': {'a': 0, 'é': 1, 'aé': 2}, 'merges': [['a', 'é']],
               'continuing_subword_prefix': 'x'}},
    {'post_processor': {'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': 'gone', 'type_id': 0}}],
                        'pair': [], 'special_tokens': {}}},
])
def test_files_that_make_the_library_panic_are_named(tmp_path, part):
    folder = write_qwen2(tmp_path / 'q', add_bos_token=None)
    write_json(folder / 'tokenizer.json', json.loads((folder / 'tokenizer.json').read_text()) | part)
    with pytest.raises(LoadError, match='LMD-151'):
        Tokenizer(str(folder))


@pytest.mark.parametrize('content', [b'', b'IQ== 0\n', b'\x00' * 100, b'\x0a\xff\xff\xff'])
def test_a_damaged_sentencepiece_model_is_named(tmp_path, content):
    folder = write_llama(tmp_path / 'l')
    (folder / 'tokenizer.model').write_bytes(content)
    with pytest.raises(LoadError, match=r'LMD-151.*tokenizer\.model'):
        Tokenizer(str(folder))


def test_special_tokens_must_be_in_a_sentencepiece_vocabulary(tmp_path):
    with pytest.raises(LoadError, match='LMD-159.*eos_token.*nowhere'):
        Tokenizer(str(write_llama(tmp_path / 'l', eos_token='<nowhere>')))


def test_a_missing_sentencepiece_package_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == 'sentencepiece':
            raise ImportError(name)
        return real(name, *args, **kwargs)

    folder = write_llama(tmp_path / 'l')
    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(LoadError, match='LMD-154.*pip install sentencepiece'):
        Tokenizer(str(folder))


def test_added_tokens_beyond_the_embedding_are_tolerated(tmp_path):
    """A text model that shares its tokenizer with a multimodal one lacks rows for image tokens only."""
    folder = write_qwen2(tmp_path / 'q', extra_special_tokens=['<image>'])
    rows = Tokenizer(str(folder)).special_tokens['<image>']
    write_json(folder / 'config.json', {'vocab_size': rows})
    assert Tokenizer(str(folder)).vocab_size == rows + 1

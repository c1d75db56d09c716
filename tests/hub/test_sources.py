"""What a source text means: the table of bad ones, the local ones, and the names of files."""

from __future__ import annotations

import os
import socket
import string
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.errors import SourceError
from lmdeploy.hub import catalog, local, names
from lmdeploy.hub.resolve import checked, resolve
from lmdeploy.texts.source import PHRASES, TEXTS, phrase


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Whatever reaches for the network, or starts pip, fails the test."""
    def refuse(*args, **kwargs):
        raise AssertionError('a local source must not reach for the network')

    monkeypatch.setattr(socket, 'create_connection', refuse)
    monkeypatch.setattr('subprocess.Popen', refuse)
    monkeypatch.setenv('LMDEPLOY_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('LMDEPLOY_USE_MODELSCOPE', raising=False)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with models of every kind in it."""
    def write(name: str, content: bytes = b'{}') -> None:
        path = tmp_path / 'here' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    for name in ('good/config.json', 'good/model.safetensors', 'good/tokenizer.json', 'bare/config.json',
                 'nested/inner/config.json', 'lora/adapter_config.json', 'lora/adapter_model.safetensors',
                 'pickle/config.json', 'pickle/pytorch_model.bin', 'empty/README.md',
                 'cache/models--a--b/snapshots/0123/config.json', 'noconfig/model.safetensors', 'one.safetensors'):
        write(name)
    for name in ('x.gguf', 'folder/x.gguf', 'withconfig/x.gguf', 'two/a.gguf', 'two/b.gguf', '模型/文件 1.gguf',
                 'split/m-00001-of-00002.gguf', 'split/m-00002-of-00002.gguf'):
        write(name, b'GGUF' + bytes(20))
    write('withconfig/config.json')
    write('nothing.gguf', b'')
    write('other.gguf', b'GGML' + bytes(20))
    write('lfs.gguf', b'version https://git-lfs.github.com/spec/v1\n')
    write('weights.pth', b'PK')
    os.mkfifo(tmp_path / 'here/pipe.gguf')
    (tmp_path / 'here/fifo').mkdir()
    os.mkfifo(tmp_path / 'here/fifo/config.json')
    (tmp_path / 'here/loop.gguf').symlink_to('loop.gguf')
    monkeypatch.chdir(tmp_path / 'here')
    return tmp_path / 'here'


GOOD = {
    'good': ('good', 'hf'), './good/': ('good', 'hf'), '  good ': ('good', 'hf'), 'bare': ('bare', 'hf'),
    'nested/inner': ('nested/inner', 'hf'), 'x.gguf': ('x.gguf', 'gguf'), 'folder': ('folder/x.gguf', 'gguf'),
    'withconfig': ('withconfig/x.gguf', 'gguf'), '模型/文件 1.gguf': ('模型/文件 1.gguf', 'gguf'),
}


@pytest.mark.parametrize('source', GOOD)
def test_a_local_model_is_found(here, source):
    path, kind = GOOD[source]
    files = resolve(source)
    assert (files.path, files.kind, files.origin) == (Path(path), kind, 'local')
    assert files.source == source.strip()


def test_absolute_paths_home_and_path_objects(here, monkeypatch):
    monkeypatch.setenv('HOME', str(here))
    assert resolve(str(here / 'good')).path == here / 'good'
    assert resolve('~/good').path == here / 'good'
    assert resolve(here / 'x.gguf').path == here / 'x.gguf'


# source: (code, what the message must say)
BAD = {
    'tmp/models/x': ('LMD-101', '/tmp/models/x'),
    'root/share/new_models/internlm': ('LMD-101', 'did you mean /root/share/new_models/internlm'),
    'usr/lib': ('LMD-101', '/usr/lib'),
    '/root/share/no/such': ('LMD-102', '/root/share/no/such'),
    './nothing': ('LMD-102', './nothing'),
    '../nothing': ('LMD-102', 'nothing'),
    '~/no-such-model': ('LMD-102', '~/no-such-model'),
    './god': ('LMD-102', 'good'),
    'nested/iner/deep': ('LMD-102', 'nested/iner/deep'),
    'y.gguf': ('LMD-102', 'x.gguf'),
    'pytorch_model.bin': ('LMD-102', 'pytorch_model.bin'),
    'a/b/c': ('LMD-102', 'a/b/c'),
    'org/name/': ('LMD-102', 'org/name/'),
    'C:\\models\\x': ('LMD-102', 'Windows'),
    'models\\x': ('LMD-102', 'models\\x'),
    'x.gguf/y': ('LMD-102', 'x.gguf/y'),
    'loop.gguf': ('LMD-102', 'loop.gguf'),
    'a' * 300 + '.gguf': ('LMD-102', 'aaa'),
    'nested': ('LMD-103', 'nested/inner'),
    'cache/models--a--b': ('LMD-103', 'snapshots/0123'),
    'lora': ('LMD-103', 'LoRA'),
    'empty': ('LMD-103', 'config.json'),
    'noconfig': ('LMD-103', 'config.json'),
    '.': ('LMD-195', 'x.gguf'),
    'smollm2': ('LMD-104', 'smollm2:135m'),
    'smollm:135m': ('LMD-104', 'smollm2:135m'),
    'qwen2.5-coder:0.6b': ('LMD-104', 'qwen2.5-coder:0.5b'),
    'goood': ('LMD-104', 'good'),
    'one.safetensors': ('LMD-107', 'give the folder'),
    'pipe.gguf': ('LMD-107', 'pipe'),
    'fifo': ('LMD-107', 'config.json'),
    '/dev/null': ('LMD-107', 'device'),
    'nothing.gguf': ('LMD-107', 'empty'),
    'other.gguf': ('LMD-107', 'GGUF'),
    'lfs.gguf': ('LMD-107', 'git lfs pull'),
    'split/m-00001-of-00002.gguf': ('LMD-107', 'one piece'),
    'pickle': ('LMD-108', 'pytorch_model.bin'),
    'weights.pth': ('LMD-108', 'pickle'),
    'two': ('LMD-195', 'a.gguf, b.gguf'),
    'split': ('LMD-195', 'm-00001-of-00002.gguf'),
    '': ('LMD-109', 'empty'),
    ' \t': ('LMD-109', 'empty'),
    'x\0y': ('LMD-109', 'control'),
    'a\nb/c': ('LMD-109', 'control'),
    'bad\udcff/name': ('LMD-109', 'broken'),
    'x' * 5000: ('LMD-109', '5000'),
    'https://huggingface.co/org/name': ('LMD-109', 'URL'),
    'org/na me': ('LMD-109', 'org/name'),
    'org/..': ('LMD-109', 'org/name'),
    'org/a..b': ('LMD-109', 'org/name'),
    'org/' + 'n' * 97: ('LMD-109', 'org/name'),
    'org/name?x=1': ('LMD-109', 'org/name'),
    'hf:': ('LMD-109', 'org/name'),
    'hf:org/name/config.json': ('LMD-109', 'file.gguf'),
    'hf:/etc/passwd': ('LMD-109', 'org/name'),
    'ms:name': ('LMD-109', 'org/name'),
    'ms:../../x': ('LMD-109', 'org/name'),
    'pypi:name': ('LMD-109', 'name==version'),
    'pypi:--index-url=http://x==1': ('LMD-109', 'name==version'),
    'pypi:a b==1': ('LMD-109', 'name==version'),
    'pypi:-r==1': ('LMD-109', 'name==version'),
}


@pytest.mark.parametrize('source', BAD, ids=lambda source: ascii(source)[:40])
def test_a_bad_source_is_refused_at_once(here, source):
    code, words = BAD[source]
    start = time.perf_counter()
    with pytest.raises(SourceError) as caught:
        resolve(source)
    assert time.perf_counter() - start < 1
    assert caught.value.code == code
    assert words in str(caught.value)
    assert caught.value.text('zh') != caught.value.text('en')


@pytest.mark.parametrize('source', [None, 7, b'smollm2:135m', ['smollm2:135m']])
def test_a_source_is_a_text(source):
    with pytest.raises(SourceError, match='not a text'):
        resolve(source)


@pytest.mark.parametrize('revision', ['', 'a b', '../x', 'x' * 200, 7, '-x\n'])
def test_a_revision_is_a_plain_name(revision):
    with pytest.raises(SourceError, match='LMD-109'):
        resolve('org/name', revision=revision)


def test_a_folder_that_may_not_be_read(here, monkeypatch):
    def refuse(path):  # permissions do not bind the administrator, who may run this test
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(SourceError, match='LMD-198.*good.*Permission denied'):
        resolve('good')


@given(st.text(max_size=60))
def test_any_text_is_either_refused_or_usable(text):
    try:
        assert checked(text) == text.strip()
    except SourceError as error:
        assert error.code == 'LMD-109'
    else:
        assert local.exists(Path(text)) in (True, False)


@given(st.lists(st.text('./\\' + string.ascii_letters + ' \0-_…', max_size=12), max_size=4).map('/'.join))
def test_a_plain_name_stays_below_its_folder(name):
    if names.is_plain(name):
        assert os.path.normpath(os.path.join('/base/folder', name)) == f'/base/folder/{name}'


def test_files_that_are_read_are_chosen_and_no_others():
    choice = names.choose(['config.json', 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors',
                           'model.safetensors.index.json', 'tokenizer.json', 'tokenizer.model', 'chat_template.jinja',
                           'consolidated.safetensors', 'original/model.safetensors', 'pytorch_model.bin',
                           'modeling_x.py', 'README.md', 'model.onnx', '1_Pooling/config.json', 'onnx/deep/config.json',
                           'x.gguf'])
    assert choice.verdict == 'hf'
    assert choice.files == ('1_Pooling/config.json', 'chat_template.jinja', 'config.json',
                            'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors',
                            'model.safetensors.index.json', 'tokenizer.json', 'tokenizer.model')


@pytest.mark.parametrize(('files', 'verdict'), [
    (['config.json', 'consolidated.safetensors'], 'hf'), (['x.gguf', 'README.md'], 'gguf'),
    (['q4/x.gguf', 'config.json'], 'gguf'), (['a.gguf', 'b.gguf'], 'several'), (['x-00001-of-00001.gguf'], 'several'),
    (['config.json', 'model.pth'], 'pickle'), (['config.json', 'training_args.bin'], 'none'),
    (['model.safetensors'], 'none'), ([], 'none'),
])
def test_what_a_list_of_names_amounts_to(files, verdict):
    assert names.choose(files).verdict == verdict


def test_texts_take_the_same_parameters_in_both_languages():
    def fields(text: str) -> set[str]:
        return {field for _, field, _, _ in string.Formatter().parse(text) if field}

    for code, entry in TEXTS.items():
        assert fields(entry['en']) == fields(entry['zh']), code
    for name, entry in PHRASES.items():
        assert fields(entry.en) == fields(entry.zh), name
    made = phrase('no member', member='x')
    assert f'{made:en}' == str(made) and f'{made:zh}' == made.zh


def test_the_catalog_is_consistent():
    assert len(set(catalog.aliases())) == 4 and catalog.find(catalog.DEFAULT.upper()) is not None
    for entry in catalog.entries():
        assert entry.bytes > 0 and entry.payload_bytes > 0 and all(len(record.sha256) == 64 for record in entry.files)
        assert all(names.is_plain(record.name) for record in entry.files)
        assert entry.upgrade is None or '/' in entry.upgrade or catalog.find(entry.upgrade) is not None
        assert entry.kind == 'hf' or entry.payload_bytes == entry.bytes
    assert [entry.alias for entry in catalog.installed()] == []

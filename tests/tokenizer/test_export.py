"""A vocabulary out of a GGUF file, written as a Hugging Face folder, gives the same ids, here and in transformers."""

from __future__ import annotations

import json

import pytest

from lmdeploy.tokenizer import Tokenizer
from lmdeploy.tokenizer.export import tokenizer_files
from tests.tokenizer import vocabularies
from tests.tokenizer.conftest import gguf_tokenizer
from tests.tokenizer.corpus import lines

METADATA = {
    'byte level': lambda: vocabularies.byte_level_metadata(),
    'byte level with bos': lambda: vocabularies.byte_level_metadata() | {'tokenizer.ggml.add_bos_token': True,
                                                                         'tokenizer.ggml.bos_token_id': 5},
    'sentencepiece': lambda: vocabularies.spm_metadata(vocabularies.spm_bytes()),
}  # fmt: skip


@pytest.mark.parametrize('kind', METADATA)
def test_ids_and_settings(tmp_path, kind):
    original = gguf_tokenizer(tmp_path / 'x.gguf', METADATA[kind]())
    folder = tmp_path / 'folder'
    folder.mkdir()
    for name, content in tokenizer_files(original).items():
        (folder / name).write_bytes(content)
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': sorted(original.eos_token_ids)}))
    written = Tokenizer(str(folder))
    for line in lines(300):
        assert written.encode(line) == original.encode(line)
        assert written.encode_segments([(line, False)]) == original.encode_segments([(line, False)])
    for name in ('special_tokens', 'eos_token_id', 'bos_token_id', 'eos_token_ids', 'chat_templates', 'add_bos'):
        assert getattr(written, name) == getattr(original, name), name
    if not kind.startswith('sentencepiece'):
        from transformers import AutoTokenizer

        peer = AutoTokenizer.from_pretrained(folder)
        for line in lines(100):
            assert peer.encode(line) == original.encode(line)

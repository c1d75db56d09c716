"""One tokenizer of every kind, built once."""

from __future__ import annotations

import pytest

from lmdeploy.tokenizer import Tokenizer
from tests.tokenizer import vocabularies

INTERNLM = ('<|im_start|>', '<|im_end|>')
KINDS = ('qwen2', 'llama', 'internlm', 'prepend', 'gguf')


@pytest.fixture(scope='session')
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    """``qwen2``: byte-level tokenizer.json. ``llama``, ``internlm``: tokenizer.model, the latter with renamed pieces.
    ``prepend``: SentencePiece as tokenizer.json, a prefix space after every special token. ``gguf``: its metadata."""
    root = tmp_path_factory.mktemp('tokenizers')
    vocabularies.write_qwen2(root / 'qwen2')
    vocabularies.write_llama(root / 'llama')
    write_internlm(root / 'internlm')
    write_prepend(root / 'prepend')
    made = {name: Tokenizer(str(root / name)) for name in KINDS if name != 'gguf'}
    metadata = vocabularies.spm_metadata(vocabularies.spm_bytes())
    kinds = metadata['tokenizer.ggml.token_type']
    for text, kind in (('<|im_start|>', 3), ('<tool_call>', 4), (' ' * 20, 4)):
        metadata['tokenizer.ggml.tokens'].append(text)
        metadata['tokenizer.ggml.scores'].append(-1e4)
        kinds.append(kind)
    made['gguf'] = gguf_tokenizer(root / 'spm.gguf', metadata)
    return made


def write_internlm(folder):
    """InternLM2's way: placeholder pieces of the model, renamed to control tokens by tokenizer_config.json."""
    placeholders = ('[UNUSED_TOKEN_0]', '[UNUSED_TOKEN_1]')
    vocabularies.write_llama(folder, tokenizer_class='InternLM2Tokenizer', legacy=None, added_tokens_decoder={
        str(3 + n): {'content': text, 'special': True} for n, text in enumerate(INTERNLM)})
    (folder / 'tokenizer.model').write_bytes(vocabularies.spm_bytes(prefix=False, user_defined=placeholders))
    return folder


def write_prepend(folder):
    vocabularies.write_llama(folder, tokenizer_class='PreTrainedTokenizerFast', add_bos_token=None)
    (folder / 'tokenizer.json').write_text(vocabularies.llama_json(prepend=True), encoding='utf-8')
    return folder


def gguf_tokenizer(path, metadata) -> Tokenizer:
    """A tokenizer of a GGUF file that holds these metadata and no tensor."""
    import gguf

    writer = gguf.GGUFWriter(str(path), metadata['general.architecture'])
    for key, value in metadata.items():
        if key != 'general.architecture':
            add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
            add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Tokenizer(str(path))

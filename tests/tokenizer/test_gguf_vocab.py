"""Vocabularies inside GGUF files."""

from __future__ import annotations

import pytest

from lmdeploy.errors import LoadError
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.tokenizer.gguf_vocab import PRE_TOKENIZERS, from_metadata
from tests.tokenizer import vocabularies
from tests.tokenizer.conftest import gguf_tokenizer
from tests.tokenizer.corpus import lines, plain_lines


def test_byte_level_ids_are_those_of_the_original_tokenizer(tmp_path, tokenizers):
    tokenizer, original = gguf_tokenizer(tmp_path / 'x.gguf', vocabularies.byte_level_metadata()), tokenizers['qwen2']
    for line in lines(800):
        assert tokenizer.encode(line) == original.encode(line)
    assert tokenizer.special_tokens == original.special_tokens
    assert tokenizer.added_tokens == original.added_tokens
    assert tokenizer.chat_template == vocabularies.CHATML
    assert tokenizer.eos_token_id == original.eos_token_id
    # without a generation_config.json the names of control tokens say what else ends a text
    assert tokenizer.eos_token_ids == {original.special_tokens[t] for t in ('<|endoftext|>', '<|im_end|>')}
    assert not tokenizer.add_bos


@pytest.mark.parametrize('prefix', [True, False])
@pytest.mark.parametrize('vocab_size', [1600, 2400])
def test_sentencepiece_ids_are_those_of_sentencepiece(vocab_size, prefix):
    import sentencepiece

    model = vocabularies.spm_bytes(vocab_size, prefix)
    itself = sentencepiece.SentencePieceProcessor(model_proto=model)
    metadata = vocabularies.spm_metadata(model) | {'tokenizer.ggml.add_space_prefix': prefix}
    vocabulary, settings = from_metadata(metadata, 'x.gguf')
    assert settings.add_bos
    for line in plain_lines(1000):
        if not any(token in line for token in vocabulary.added):
            assert vocabulary.encode(line) == itself.encode(line)


def test_sentencepiece_vocabularies_with_odd_entries():
    """Twice the same piece, an empty piece, a null character: such entries cannot occur in a text, the others work."""
    metadata = vocabularies.spm_metadata(vocabularies.spm_bytes())
    clean, _ = from_metadata(metadata, 'x.gguf')
    for token in ('the', '', 'a\0b', '</s>'):
        metadata['tokenizer.ggml.tokens'].append(token)
        metadata['tokenizer.ggml.scores'].append(0.0)
        metadata['tokenizer.ggml.token_type'].append(1)
    odd, _ = from_metadata(metadata, 'x.gguf')
    assert odd.size == clean.size + 4
    for line in lines(300):
        assert odd.encode(line) == clean.encode(line)


@pytest.mark.parametrize(('pre', 'text', 'words'), [
    ('smollm', 'in  2024,', ['in', '  ', '2', '0', '2', '4', ',']),
    ('default', 'in  2024,', ['in', ' ', ' 2024', ',']),
    ('qwen2', "it's 2024\n\n x", ['it', "'s", ' ', '2', '0', '2', '4', '\n\n', ' x']),
    ('llama-bpe', "IT'S 12345", ['IT', "'S", ' ', '123', '45']),
    ('deepseek-v3', '在2024年 now', ['在', '202', '4', '年', ' now']),
    ('gpt-4o', "HelloWorld's x/", ['Hello', "World's", ' x', '/']),
    ('tekken', 'HelloWorld 12/', ['Hello', 'World', ' ', '1', '2', '/']),
])
def test_pre_tokenizers(pre, text, words):
    vocabulary, _ = from_metadata(vocabularies.byte_level_metadata(pre), 'x.gguf')
    cut = [text[a:b] for _, (a, b) in vocabulary.full.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == words


def test_whole_words_come_before_merges():
    """A Llama 3 word that is a token is that token, though no merge leads to it."""
    metadata = vocabularies.byte_level_metadata('llama-bpe')
    metadata['tokenizer.ggml.tokens'].append('zqzqzq')
    metadata['tokenizer.ggml.token_type'].append(1)
    new = len(metadata['tokenizer.ggml.tokens']) - 1
    assert from_metadata(metadata, 'x')[0].encode('zqzqzq') == [new]
    assert from_metadata(metadata | {'tokenizer.ggml.pre': 'qwen2'}, 'x')[0].encode('zqzqzq') != [new]


def test_bos_by_default_only_where_the_model_was_trained_so():
    for pre in PRE_TOKENIZERS:
        metadata = vocabularies.byte_level_metadata(pre)
        del metadata['tokenizer.ggml.add_bos_token']
        assert from_metadata(metadata, 'x')[1].add_bos is PRE_TOKENIZERS[pre].add_bos


def change(**values):
    return lambda metadata: metadata | {'tokenizer.' + key.replace('__', '.'): value for key, value in values.items()}


def drop(name):
    return lambda metadata: {key: value for key, value in metadata.items() if key != f'tokenizer.ggml.{name}'}


@pytest.mark.parametrize(('edit', 'message'), [
    (change(ggml__model='bert'), r"LMD-155.*'bert'.*gpt2, llama"),
    (drop('model'), 'LMD-155.*None'),
    (change(ggml__pre='martian'), "LMD-156.*'martian'.*qwen2"),
    (change(ggml__pre=3), 'LMD-157.*ggml.pre'),
    (drop('tokens'), 'LMD-157.*tokens is missing'),
    (change(ggml__tokens=[]), 'LMD-157.*tokens is missing'),
    (change(ggml__tokens='abc'), 'LMD-157.*not an array'),
    (change(ggml__tokens=[1, 2]), 'LMD-157.*int.*str'),
    (change(ggml__token_type=[1, 1]), 'LMD-157.*2 entries in tokenizer.ggml.token_type'),
    (drop('merges'), 'LMD-157.*merges is missing'),
    (change(ggml__merges=['a']), 'LMD-157'),
    (change(ggml__merges=['zz zzz']), 'LMD-157'),
    (change(ggml__eos_token_id=10**9), 'LMD-157.*eos_token_id is 1000000000'),
    (change(ggml__eos_token_id='x'), 'LMD-157.*eos_token_id'),
    (change(ggml__add_bos_token='yes'), 'LMD-157.*add_bos_token'),
    (change(chat_template=7), 'LMD-157.*chat_template'),
])
def test_unusable_metadata_are_named(edit, message):
    with pytest.raises(LoadError, match=message):
        from_metadata(edit(vocabularies.byte_level_metadata()), 'x.gguf')


def test_sentencepiece_types_are_checked():
    metadata = vocabularies.spm_metadata(vocabularies.spm_bytes())
    metadata['tokenizer.ggml.token_type'][5] = 77
    with pytest.raises(LoadError, match='LMD-157.*token 5 has type 77'):
        from_metadata(metadata, 'x.gguf')


def test_embedding_rows_are_checked(tmp_path):
    metadata = vocabularies.byte_level_metadata() | {'qwen2.vocab_size': 100}
    with pytest.raises(LoadError, match='LMD-153.*100'):
        gguf_tokenizer(tmp_path / 'x.gguf', metadata)


def test_named_chat_templates(tmp_path):
    metadata = vocabularies.byte_level_metadata() | {'tokenizer.chat_template.tool_use': 'T'}
    tokenizer: Tokenizer = gguf_tokenizer(tmp_path / 'x.gguf', metadata)
    assert tokenizer.chat_templates == {'default': vocabularies.CHATML, 'tool_use': 'T'}

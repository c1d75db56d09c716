"""Two published GGUF files beside transformers loading the same file, on 2,000 lines of mixed text.

Where transformers' reader of GGUF files leaves out a step of the original tokenizer, ours has it, and the test says
exactly which: it puts that one step into transformers' tokenizer and wants every line to agree.
"""

from __future__ import annotations

import time
import unicodedata

import pytest

from lmdeploy.tokenizer import Tokenizer
from tests.tokenizer.corpus import lines

pytestmark = pytest.mark.real


def theirs(path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def mismatches(ours, theirs, texts):
    return [text for text in texts if ours.encode(text) != theirs.encode(text)]


def test_qwen_coder(qwen_coder):
    """transformers leaves out Unicode composition (NFC), which the original tokenizer.json has."""
    from transformers import Qwen2Tokenizer

    ours, reader, texts = Tokenizer(str(qwen_coder)), theirs(qwen_coder), lines(2000)
    composed = [text for text in texts if unicodedata.is_normalized('NFC', text)]
    assert len(composed) > 1400
    assert mismatches(ours, reader, composed) == []
    for text in texts:
        assert ours.encode(text) == reader.encode(unicodedata.normalize('NFC', text))
    # transformers' class of the original repository does compose
    assert type(Qwen2Tokenizer().backend_tokenizer.normalizer).__name__ == 'NFC'
    reader.backend_tokenizer.normalizer = Qwen2Tokenizer().backend_tokenizer.normalizer
    assert mismatches(ours, reader, texts) == []
    same_text(ours, reader, texts)


def test_smollm2(smollm2):
    """transformers leaves out the cutting of digits, which the pre-tokenizer named ``smollm`` stands for; no merge of
    the file has a digit in it, so the model has seen digits in no other way."""
    from tokenizers import pre_tokenizers

    ours, reader, texts = Tokenizer(str(smollm2)), theirs(smollm2), lines(2000)
    without = [text for text in texts if not any(unicodedata.category(char).startswith('N') for char in text)]
    assert len(without) > 400
    assert mismatches(ours, reader, without) == []
    backend = reader.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    assert mismatches(ours, reader, texts) == []
    same_text(ours, reader, texts)


def same_text(ours, reader, texts):
    for text in texts:
        ids = reader.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == reader.decode(ids, skip_special_tokens=skip)


def test_users_cannot_write_control_tokens(smollm2, qwen_coder):
    for path in (smollm2, qwen_coder):
        tokenizer = Tokenizer(str(path))
        control = set(tokenizer.control_tokens.values())
        start = tokenizer.special_tokens['<|im_start|>']
        assert control == set(tokenizer.added_tokens.values())
        for text in tokenizer.added_tokens:
            ids = tokenizer.encode_segments([('<|im_start|>', True), (f'a{text}b', False)], add_bos=True)
            assert [i for i in ids if i in control] == [start]
            assert tokenizer.decode(ids, skip_special_tokens=False) == f'<|im_start|>a{text}b'


def test_loading_is_quick(qwen_coder):
    Tokenizer(str(qwen_coder))  # libraries and file are in memory now
    start = time.process_time()
    Tokenizer(str(qwen_coder))
    assert time.process_time() - start < 1.2

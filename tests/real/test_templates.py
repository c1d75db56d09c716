"""The templates inside the real files render as transformers renders them."""

from __future__ import annotations

import pytest

from lmdeploy.chat import resolve_template
from lmdeploy.tokenizer import Tokenizer

pytestmark = pytest.mark.real

CONVERSATIONS = [
    [{'role': 'user', 'content': '你好,请介绍一下你自己'}],
    [{'role': 'system', 'content': 'Be brief.\n'}, {'role': 'user', 'content': ' provide three suggestions 🙂 '}],
    [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b\n\n'},
     {'role': 'user', 'content': '{{ 7*7 }}'}],
]
CITY = {'type': 'object', 'properties': {'city': {'type': 'string'}}}
TOOLS = [{'type': 'function', 'function': {'name': 'weather', 'description': '查询天气', 'parameters': CITY}}]


@pytest.fixture(scope='module', params=['smollm2', 'qwen_coder'])
def tokenizers(request):
    """transformers' tokenizer of the file, ours, and our template."""
    from transformers import AutoTokenizer

    path = request.getfixturevalue(request.param)
    ours = Tokenizer(str(path))
    return (AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), ours,
            resolve_template(str(path), ours, None))


@pytest.mark.parametrize('conversation', CONVERSATIONS)
@pytest.mark.parametrize('tools', [None, TOOLS])
def test_rendered_text_and_ids(conversation, tools, tokenizers):
    theirs, ours, template = tokenizers
    segments = template.render(conversation, tools=tools)
    text = theirs.apply_chat_template(conversation, tools=tools, tokenize=False, add_generation_prompt=True)
    assert ''.join(segment.text for segment in segments) == text
    if not any(char.isdigit() for char in text):  # transformers does not know that 'smollm' splits digits off
        assert ours.encode_segments(segments, add_bos=template.add_bos) == theirs.encode(text, add_special_tokens=False)

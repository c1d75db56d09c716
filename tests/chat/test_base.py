"""Box templates: what a prompt and a conversation become."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.chat.base import BaseChatTemplate, BaseModel
from lmdeploy.chat.messages import check_messages
from lmdeploy.errors import ConfigError, RequestError

BOXES = {'system': '<s>', 'meta_instruction': 'META', 'eosys': '</s>', 'user': '<u>', 'eoh': '</u>',
         'assistant': '<a>', 'eoa': '</a>', 'separator': '|', 'tool': '<t>', 'eotool': '</t>'}


def test_prompts():
    template = BaseChatTemplate(**BOXES)
    assert template.get_prompt('p') == '<s>META</s><u>p</u><a>'
    assert template.get_prompt('p', sequence_start=False) == '|<u>p</u><a>'
    assert BaseChatTemplate(**{**BOXES, 'meta_instruction': None}).get_prompt('p') == '<u>p</u><a>'
    assert BaseChatTemplate(**BOXES, capability='completion').get_prompt('p') == 'p'
    assert BaseChatTemplate().get_prompt('p') == 'p'


def test_conversations():
    template = BaseChatTemplate(**BOXES)
    talk = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}, {'role': 'user', 'content': 'c'}]
    assert template.messages2prompt(talk) == '<s>META</s><u>a</u><a>b</a>|<u>c</u><a>'
    assert template.messages2prompt([{'role': 'system', 'content': 'S'}, *talk]) == (
        '<s>S</s><u>a</u><a>b</a>|<u>c</u><a>')
    assert template.messages2prompt(talk[:2]) == '<s>META</s><u>a</u><a>b', 'a last answer goes on'
    assert template.messages2prompt([*talk[:1], {'role': 'tool', 'content': 'r'}]) == (
        '<s>META</s><u>a</u><t>r</t><a>')
    assert template.messages2prompt([{'role': 'assistant', 'content': None}, *talk[:1]]) == (
        '<s>META</s><a></a>|<u>a</u><a>')
    assert template.messages2prompt([{'role': 'developer', 'content': 'S'}, *talk[:1]]) == '<s>S</s><u>a</u><a>'


def test_content_parts_are_lines():
    parts = [{'role': 'user', 'content': [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]}]
    assert BaseChatTemplate(user='U').messages2prompt(parts) == 'Ua\nb'


def test_capabilities():
    raw = BaseChatTemplate(**BOXES, capability='completion')
    assert raw.messages2prompt([{'role': 'user', 'content': 'p'}]) == 'p'
    with pytest.raises(ConfigError) as caught:
        BaseChatTemplate(capability='singing')
    assert caught.value.code == 'LMD-182' and 'completion' in str(caught.value)


@given(st.text(), st.booleans())
def test_a_prompt_is_a_conversation_of_one_message(prompt, start):
    template = BaseChatTemplate(**BOXES)
    expected = template.get_prompt(prompt, start)
    assert template.messages2prompt(prompt, start) == expected
    assert template.messages2prompt([{'role': 'user', 'content': prompt}], start) == expected


@given(st.lists(st.text(max_size=9), min_size=3, max_size=9).filter(lambda t: len(t) % 2))
def test_turn_by_turn_is_the_whole_conversation(texts):
    template = BaseChatTemplate(**BOXES)
    messages = [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)]
    pieces = ''.join(template.get_prompt(text, i == 0) if i % 2 == 0 else text + template.eoa
                     for i, text in enumerate(texts))
    assert template.messages2prompt(messages) == pieces


def test_a_role_without_a_box():
    with pytest.raises(RequestError) as caught:
        BaseChatTemplate().messages2prompt([{'role': 'narrator', 'content': 'x'}])
    assert caught.value.code == 'LMD-176' and 'narrator' in str(caught.value) and 'assistant' in str(caught.value)


def test_the_plain_model_passes_prompts_on():
    model = BaseModel(stop_words=['x'], anything='else')
    assert model.messages2prompt('p') == model.get_prompt('p') == 'p' and model.stop_words == ['x']
    assert model.messages2prompt([{'role': 'user', 'content': 'a'}, {'role': 'user', 'content': 'b'}]) == 'ab'
    assert BaseModel.match('anything') is None


@pytest.mark.parametrize(('messages', 'code', 'says'), [
    ('text', 'LMD-175', 'str'), ([], 'LMD-175', 'empty'), (None, 'LMD-175', 'NoneType'), (['x'], 'LMD-175', 'str'),
    ([{}], 'LMD-175', 'role'), ([{'role': 1, 'content': 'x'}], 'LMD-175', 'role'),
    ([{'role': 'user'}], 'LMD-175', 'content'), ([{'role': 'user', 'content': 3}], 'LMD-175', 'int'),
    ([{'role': 'user', 'content': ['x']}], 'LMD-175', 'part'),
    ([{'role': 'user', 'content': [{'type': 'text'}]}], 'LMD-175', 'text'),
    ([{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': 'x'}}]}], 'LMD-183', 'image_url'),
    ([{'role': 'user', 'content': '\ud800'}], 'LMD-175', 'surrogate'),
    ([{'role': 'user', 'content': 'x', 'extra': object()}], 'LMD-175', 'object'),
    ([{'role': 'assistant', 'tool_calls': 'x'}], 'LMD-175', 'tool_calls'),
    ([{'role': 'user', 'content': 'ok'}, {'role': 'assistant', 'tool_calls': [1]}], 'LMD-175', 'message 1'),
])
def test_messages_of_a_wrong_shape(messages, code, says):
    with pytest.raises(RequestError) as caught:
        check_messages(messages)
    assert caught.value.code == code and says in str(caught.value) and caught.value.text('zh')


def test_messages_nested_too_deeply():
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(RequestError):
        check_messages([{'role': 'user', 'content': 'x', 'extra': deep}])


def test_checking_copies():
    message = {'role': 'assistant', 'content': None, 'tool_calls': [{'function': {'name': 'f', 'arguments': '{}'}}]}
    checked = check_messages((message,))
    assert checked == [{**message, 'content': ''}]
    assert checked[0]['tool_calls'] is not message['tool_calls'] and message['content'] is None

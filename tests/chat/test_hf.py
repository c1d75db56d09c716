"""The models' own templates: equal to transformers, and every failure an error of ours with a line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from lmdeploy.chat.hf import HFChatTemplate, check_extra
from lmdeploy.errors import RequestError, TemplateError
from tests.chat import templates

SPECIAL = {'bos_token': '<s>', 'eos_token': '</s>'}
TOOLS = [{'type': 'function', 'function': {
    'name': 'weather', 'description': 'Das Wetter <heute> & "morgen"', 'parameters': {
        'type': 'object', 'properties': {'城市': {'type': 'string'}, 'items': {'type': 'array'}},
        'required': ['城市']}}}]


def reference(source: str, messages: list[dict], **options) -> str:
    return render_jinja_template([messages], chat_template=source, **SPECIAL, **options)[0][0]


def alternating(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict]]:
    turns = st.lists(text, min_size=1, max_size=5).map(lambda texts: texts if len(texts) % 2 else texts[:-1])
    return st.tuples(st.none() | text, turns).map(lambda t: [
        *([{'role': 'system', 'content': t[0]}] if t[0] is not None else []),
        *({'role': ('user', 'assistant')[i % 2], 'content': c} for i, c in enumerate(t[1]))])


@pytest.mark.parametrize('name', templates.ALL)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_renders_what_transformers_renders(name, data):
    source = templates.ALL[name]
    template = _cached(name)
    text = st.text(max_size=30) | st.sampled_from((
        '<think>\na\n</think>\n\nb', ' spaced\n', '{{ x }}', '<tool_response>'))
    messages = data.draw(alternating(text))
    tools = data.draw(st.sampled_from((None, TOOLS)))
    if name in ('llama3.1', 'mistral') and messages[0]['role'] == 'system' and len(messages) == 1:
        return
    assert template.messages2prompt(messages, tools=tools) == reference(
        source, messages, tools=tools, add_generation_prompt=True)


_templates: dict[str, HFChatTemplate] = {}


def _cached(name: str) -> HFChatTemplate:
    if name not in _templates:
        _templates[name] = HFChatTemplate(templates.ALL[name], SPECIAL)
    return _templates[name]


@pytest.mark.parametrize('name', ['llama3.1', 'qwen3'])
def test_tool_calls_and_results(name):
    arguments = {'城市': '北京 "x" <b>', 'n': 3}
    messages = [{'role': 'user', 'content': 'q'},
                {'role': 'assistant', 'content': '', 'tool_calls': [
                    {'id': '1', 'type': 'function', 'function': {'name': 'weather', 'arguments': arguments}}]},
                {'role': 'tool', 'content': '{"t": 3}', 'tool_call_id': '1'}]
    expected = reference(templates.ALL[name], messages, tools=TOOLS, add_generation_prompt=True)
    assert _cached(name).messages2prompt(messages, tools=TOOLS) == expected
    as_openai = [dict(m) for m in messages]
    as_openai[1]['tool_calls'] = [{'id': '1', 'type': 'function', 'function': {
        'name': 'weather', 'arguments': '{"城市": "北京 \\"x\\" <b>", "n": 3}'}}]
    as_openai[1]['content'] = None
    assert _cached(name).messages2prompt(as_openai, tools=TOOLS) == expected


def test_templates_that_want_arguments_as_text_get_text():
    source = ("{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
              "{{ '```json\n' + c.function.arguments + '\n```' }}{% endfor %}{% endfor %}")
    template = HFChatTemplate(source)
    assert not template.wants_objects
    assert template.messages2prompt([{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'tool_calls': [
        {'function': {'name': 'f', 'arguments': '{"a": 1}'}}]}]) == 'q```json\n{"a": 1}\n```'


@pytest.mark.parametrize('key', ['reasoning_content', 'thinking', 'reasoning'])
def test_reasoning_of_old_answers_by_any_name(key):
    messages = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a', key: 'because'},
                {'role': 'tool', 'content': 'r'}]
    text = _cached('qwen3').messages2prompt(messages)
    assert text == reference(templates.QWEN3, messages, add_generation_prompt=True) and 'because' in text


def test_thinking_switch():
    messages = [{'role': 'user', 'content': 'q'}]
    for switch in (None, True, False):
        options = {} if switch is None else {'enable_thinking': switch}
        assert _cached('qwen3').messages2prompt(messages, enable_thinking=switch) == reference(
            templates.QWEN3, messages, add_generation_prompt=True, **options)
    assert _cached('qwen3').messages2prompt(messages, enable_thinking=False).endswith('</think>\n\n')


@pytest.mark.parametrize('name', ['chatml', 'llama3.1', 'qwen3', 'gemma'])
def test_a_last_assistant_message_is_continued(name):
    messages = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'The answer is'}]
    text = _cached(name).messages2prompt(messages)
    assert text == reference(templates.ALL[name], messages, continue_final_message=True)
    assert text.endswith('The answer is')


def test_an_answer_that_the_template_drops_cannot_be_continued():
    template = HFChatTemplate("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(RequestError) as caught:
        template.messages2prompt([{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}])
    assert caught.value.code == 'LMD-181'


def test_behind_an_answer_only_the_new_turn_is_rendered():
    template = _cached('llama3.1')
    turn = template.messages2prompt([{'role': 'user', 'content': 'again'}], sequence_start=False)
    assert turn == ('<|start_header_id|>user<|end_header_id|>\n\nagain<|eot_id|>'
                    '<|start_header_id|>assistant<|end_header_id|>\n\n')


def test_contents_take_the_form_that_the_template_wants():
    parts = [{'role': 'user', 'content': [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]}]
    assert _cached('chatml').messages2prompt(parts).startswith('<|im_start|>user\na\nb<|im_end|>')
    wants_parts = HFChatTemplate(templates.PARTS_ONLY)
    assert wants_parts.wants_parts
    assert wants_parts.messages2prompt([{'role': 'user', 'content': 'hi'}]) == 'User:hi<end_of_utterance>\nAssistant:'
    assert wants_parts.messages2prompt(parts) == 'User:ab<end_of_utterance>\nAssistant:'


@pytest.mark.parametrize(('source', 'code', 'line'), [
    ('{% if %}', 'LMD-172', 1),
    ('a\nb\n{{ x', 'LMD-172', 3),
    ('{{ x | no_such_filter }}', 'LMD-172', 1),
    ('\n{% for m in messages %}{% endfr %}', 'LMD-172', 2),
    ('{{ (' * 5000, 'LMD-172', None),
    ('{% if true %}' * 400 + '{% endif %}' * 400, 'LMD-172', None),
    ('x' * (1 << 20), 'LMD-172', 1),
    ('a\n{{ messages[0].content + 1 }}', 'LMD-178', 2),
    ('{{ messages[7].content.x }}', 'LMD-178', 1),
    ('a\nb\n{{ 1 // 0 }}', 'LMD-178', 3),
    ('{{ raise_exception("never") }}', 'LMD-178', 0),
    ('\n\n{{ x.__class__ }}', 'LMD-173', 3),
    ("{% include 'a' %}", 'LMD-173', 1),
])
def test_a_broken_template_is_refused_at_once_with_its_line(source, code, line):
    with pytest.raises(TemplateError) as caught:
        HFChatTemplate(source, source='some-model')
    assert caught.value.code == code
    if line is not None:
        assert caught.value.params['line'] == line
    assert 'some-model' in str(caught.value)
    assert caught.value.text('zh')


def test_what_the_template_says_reaches_the_caller():
    with pytest.raises(RequestError) as caught:
        _cached('gemma').messages2prompt([{'role': 'assistant', 'content': 'a'}, {'role': 'user', 'content': 'b'}])
    assert caught.value.code == 'LMD-177'
    assert 'must alternate' in str(caught.value)


def test_failures_on_one_conversation_are_that_request_s():
    template = HFChatTemplate('{% for m in messages %}\n{{ m.content }}{{ m.extra.a.b if m.extra }}\n{% endfor %}')
    with pytest.raises(RequestError) as caught:
        template.messages2prompt([{'role': 'user', 'content': 'x', 'extra': 'text'}])
    assert caught.value.code == 'LMD-178' and caught.value.params['line'] == 2


@pytest.mark.parametrize('extra', [
    [], 'x', {'messages': 1}, {'tools': None}, {'tokenize': True}, {'add_generation_prompt': False},
    {'chat_template': 'x'}, {'range': 1}, {'a': [1]}, {'a': {}}, {'_a': 1}, {'a b': 1}, {1: 1},
    {f'k{i}': i for i in range(17)},
])
def test_extra_values_are_few_and_plain_and_shadow_nothing(extra):
    with pytest.raises(RequestError) as caught:
        check_extra(extra)
    assert caught.value.code == 'LMD-179'


def test_extra_values_reach_the_template():
    template = HFChatTemplate("{{ mood | default('calm') }} {{ messages[0].content }}")
    messages = [{'role': 'user', 'content': 'x'}]
    assert template.messages2prompt(messages) == 'calm x'
    assert template.messages2prompt(messages, chat_template_kwargs={'mood': 'gay'}) == 'gay x'


def test_roles_are_a_closed_set_unless_the_template_names_more():
    messages = [{'role': '<|im_end|>', 'content': 'x'}]
    with pytest.raises(RequestError) as caught:
        _cached('chatml').messages2prompt(messages)
    assert caught.value.code == 'LMD-176'
    more = HFChatTemplate("{% for m in messages %}{{ 'O' if m.role == 'observer' }}{{ m.content }}{% endfor %}")
    assert more.messages2prompt([{'role': 'observer', 'content': 'x'}]) == 'Ox'

"""Which template a model gets."""

from __future__ import annotations

import json

import pytest

from lmdeploy.chat import ChatTemplateConfig, resolve_template
from lmdeploy.errors import TemplateError
from tests.chat import templates


def test_the_users_choice_wins(facts):
    template = resolve_template('/m/qwen3-8b', facts(templates.CHATML), ChatTemplateConfig('internlm2'))
    assert template.name == 'internlm2' and template.add_bos
    assert template.stop_words == ['<|im_end|>', '<|action_end|>']


def test_the_model_s_own_comes_before_its_name(facts):
    for path in ('/m/qwen3-8b', '/m/renamed'):
        template = resolve_template(path, facts(templates.CHATML))
        assert template.name == 'hf' and not template.add_bos
        assert template.render([{'role': 'user', 'content': 'x'}])[0].text.startswith('<|im_start|>user\nx')


def test_a_name_helps_where_there_is_no_template(facts):
    assert resolve_template('/m/internlm2-chat-7b', facts()).name == 'internlm2'
    assert resolve_template('/m/renamed', facts()).name == 'base'


def test_asking_for_the_model_s_own(facts):
    config = ChatTemplateConfig('hf', stop_words=['x'])
    assert resolve_template('/m/q', facts(templates.CHATML), config).stop_words == ['x']
    with pytest.raises(TemplateError) as caught:
        resolve_template('/m/qwen3', facts(), config)
    assert caught.value.code == 'LMD-185'


@pytest.mark.parametrize(('folder', 'template', 'name'), [
    ('InternVL3-1B', None, 'internvl2_5'), ('renamed', 'internvl2_5', 'internvl2_5'), ('renamed', None, 'internvl2_5'),
    ('InternVL2-8B', None, 'internvl2-internlm2'), ('renamed', 'internlm2-chat', 'internvl2-internlm2'),
])
def test_internvl_keeps_its_named_format(folder, template, name, facts, tmp_path):
    model = tmp_path / folder
    model.mkdir()
    config = {'architectures': ['InternVLChatModel'], **({'template': template} if template else {})}
    (model / 'config.json').write_text(json.dumps(config))
    assert resolve_template(str(model), facts(templates.CHATML)).name == name


def test_broken_config_files_are_left_to_others(facts, tmp_path):
    for text in ('', '[]', '{"architectures": 3}', '{"architectures": []}', '{'):
        (tmp_path / 'config.json').write_text(text)
        assert resolve_template(str(tmp_path), facts(templates.CHATML)).name == 'hf'


def test_stops_are_the_ends_that_the_template_writes_and_the_vocabulary_has(facts):
    assert resolve_template('/m', facts(templates.CHATML)).stop_words == ['<|im_end|>']
    llama = facts(templates.LLAMA31, special=('<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>', '<|eom_id|>'),
                  bos_token_id=0, eos_token_id=1)
    template = resolve_template('/m', llama)
    assert template.stop_words == ['<|end_of_text|>', '<|eot_id|>']
    text = template.render([{'role': 'user', 'content': 'x'}])[0].text
    assert text.startswith('<|begin_of_text|><|start_header_id|>')


def test_a_broken_template_is_an_error_not_a_fallback(facts):
    with pytest.raises(TemplateError) as caught:
        resolve_template('/m/qwen3', facts('{% if %}'))
    assert caught.value.code == 'LMD-172' and 'qwen3' in str(caught.value)


def test_extra_values_go_to_the_model_s_own_template_only(facts):
    own = resolve_template('/m', facts('{{ mood }}{{ messages[0].content }}'))
    messages = [{'role': 'user', 'content': 'x'}]
    assert own.render(messages, chat_template_kwargs={'mood': '<|im_end|>'}) == [('<|im_end|>', False), ('x', True)]
    named = resolve_template('/m', facts(), ChatTemplateConfig('qwen3'))
    assert named.render(messages, chat_template_kwargs={'mood': 'x'}) == named.render(messages)

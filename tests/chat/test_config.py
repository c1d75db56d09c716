"""ChatTemplateConfig and its JSON form."""

from __future__ import annotations

import pytest

from lmdeploy.chat import MODELS, BaseChatTemplate, ChatTemplateConfig
from lmdeploy.errors import ConfigError, TemplateError


@pytest.fixture(autouse=True)
def registry_left_as_it_was():
    before = dict(MODELS.module_dict)
    yield
    MODELS.module_dict.clear()
    MODELS.module_dict.update(before)


def test_fields_that_are_set_change_the_template():
    template = ChatTemplateConfig('internlm2', meta_instruction='M', stop_words=['x']).chat_template
    assert template.meta_instruction == 'M' and template.stop_words == ['x'] and template.user == '<|im_start|>user\n'


def test_an_unknown_name_is_a_plain_template_of_the_fields():
    template = ChatTemplateConfig('nobody', user='U', eoh='E').chat_template
    assert type(template) is BaseChatTemplate and template.get_prompt('p') == 'UpE'


@pytest.mark.parametrize('fields', [{'user': 3}, {'stop_words': 3}, {'stop_words': 'x'}, {'stop_words': [3]},
                                    {'model_name': 3}, {'capability': 'singing'}])
def test_fields_of_a_wrong_type(fields):
    with pytest.raises(ConfigError) as caught:
        assert ChatTemplateConfig(**{'model_name': 'qwen3', **fields}).chat_template
    assert caught.value.code in ('LMD-182', 'LMD-186') and caught.value.text('zh')


def test_json_there_and_back(tmp_path):
    config = ChatTemplateConfig('internlm2', meta_instruction='你好', stop_words=['a', 'b'])
    path = tmp_path / 'template.json'
    text = config.to_json(path)
    assert '你好' in text and '\n    "model_name"' in text and path.read_text(encoding='utf-8') == text
    for source in (text, path, str(path)):
        assert ChatTemplateConfig.from_json(source) == config


def test_json_names():
    made_up = ChatTemplateConfig.from_json('{"user": "U"}')
    assert MODELS.get(made_up.model_name) is BaseChatTemplate and made_up.chat_template.get_prompt('p') == 'Up'
    new = ChatTemplateConfig.from_json('{"model_name": "brand-new", "user": "V"}')
    assert 'brand-new' in MODELS and new.chat_template.get_prompt('p') == 'Vp'
    assert ChatTemplateConfig.from_json('{"model_name": "brand-new"}').model_name == 'brand-new'


@pytest.mark.parametrize('text', [
    '{', '{"model_name": 3}', '{"nonsense": "x"}', '{"user": ["x"]}', '{"stop_words": "x"}', '{"stop_words": [1]}',
    '/no/such/file.json', '{"user": ' + '[' * 100_000, '[1]', '',
])
def test_json_that_cannot_be_used(text, tmp_path):
    with pytest.raises(TemplateError) as caught:
        ChatTemplateConfig.from_json(text)
    assert caught.value.code == 'LMD-171' and caught.value.text('zh')
    file = tmp_path / 'x.json'
    file.write_text(text)
    with pytest.raises(TemplateError):
        ChatTemplateConfig.from_json(file)


def test_files_that_are_no_text(tmp_path):
    file = tmp_path / 'x.json'
    file.write_bytes(b'\xff\xfe{}')
    with pytest.raises(TemplateError):
        ChatTemplateConfig.from_json(file)
    with pytest.raises(TemplateError):
        ChatTemplateConfig.from_json(tmp_path)


def test_command_line_forms(tmp_path):
    file = tmp_path / 't.json'
    file.write_text('{"model_name": "qwen3", "user": "U"}')
    assert ChatTemplateConfig.from_option('qwen3') == ChatTemplateConfig('qwen3')
    assert ChatTemplateConfig.from_option(str(file)).user == 'U'
    assert ChatTemplateConfig.from_option('{"model_name": "qwen3"}') == ChatTemplateConfig('qwen3')
    assert ChatTemplateConfig.from_option('hf') == ChatTemplateConfig('hf')
    with pytest.raises(TemplateError) as caught:
        ChatTemplateConfig.from_option('no-such-template')
    assert caught.value.code == 'LMD-170' and 'internvl2_5' in str(caught.value)

"""The named templates, against the formats that the models' makers publish."""

from __future__ import annotations

import json

import pytest

from lmdeploy.chat.builtin import CLASSES, FORMATS, INTERNLM, INTERNVL25, LLAMA2, QWEN25, best_match_model
from lmdeploy.chat.config import ChatTemplateConfig
from lmdeploy.chat.registry import MODELS
from lmdeploy.log import get_logger
from tests.chat import templates

TALK = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}, {'role': 'user', 'content': 'c'}]
SYSTEM = {'role': 'system', 'content': 'S'}
TOOL = {'type': 'function', 'function': {'name': 'f', 'description': 'd', 'parameters': {'type': 'object'}}}
CALLED = [{'role': 'user', 'content': 'q'},
          {'role': 'assistant', 'content': '', 'tool_calls': [
              {'id': '1', 'type': 'function', 'function': {'name': 'f', 'arguments': '{"x": "é"}'}}]},
          {'role': 'tool', 'content': 'r1'}, {'role': 'tool', 'content': 'r2'}]
ANSWER = '<|start_header_id|>assistant<|end_header_id|>\n\n'
USER = '<|start_header_id|>user<|end_header_id|>\n\n'
DATES = 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n'


def chatml(*turns: tuple[str, str]) -> str:
    return ''.join(f'<|im_start|>{role}\n{text}<|im_end|>\n' for role, text in turns) + '<|im_start|>assistant\n'


EXPECTED = {
    'base': 'abc',
    'internlm': f'<|System|>:{INTERNLM}\n\n<|User|>:a\n<|Bot|>:b<eoa>\n<|User|>:c\n<|Bot|>:',
    'internlm2': chatml(('system', INTERNLM), ('user', 'a'), ('assistant', 'b'), ('user', 'c')),
    'internlm3': chatml(('system', INTERNLM), ('user', 'a'), ('assistant', 'b'), ('user', 'c')),
    'internvl2_5': chatml(('system', INTERNVL25), ('user', 'a'), ('assistant', 'b'), ('user', 'c')),
    'qwen': chatml(('system', 'You are a helpful assistant.'), ('user', 'a'), ('assistant', 'b'), ('user', 'c')),
    'qwen2d5': chatml(('system', QWEN25), ('user', 'a'), ('assistant', 'b'), ('user', 'c')),
    'qwen3': chatml(('user', 'a'), ('assistant', 'b'), ('user', 'c')),
    'qwq': chatml(('user', 'a'), ('assistant', 'b'), ('user', 'c')) + '<think>\n',
    'yi': chatml(('user', 'a'), ('assistant', 'b'), ('user', 'c')),
    'llama2': f'[INST] <<SYS>>\n{LLAMA2}\n<</SYS>>\n\na [/INST] b</s><s>[INST] c [/INST] ',
    'codellama': '[INST] a [/INST] b</s><s>[INST] c [/INST] ',
    'llama3': f'<|begin_of_text|>{USER}a<|eot_id|>{ANSWER}b<|eot_id|>{USER}c<|eot_id|>{ANSWER}',
    'llama3_1': f'<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{DATES}<|eot_id|>'
                f'{USER}a<|eot_id|>{ANSWER}b<|eot_id|>{USER}c<|eot_id|>{ANSWER}',
    'vicuna': 'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, '
              "detailed, and polite answers to the user's questions. USER: a ASSISTANT: b</s>USER: c ASSISTANT:",
    'mistral': '[INST] a [/INST]b</s>[INST] c [/INST]',
    'gemma': '<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n'
             '<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n',
    'deepseek': 'User: a\n\nAssistant: b<｜end▁of▁sentence｜>User: c\n\nAssistant:',
    'deepseek-v3': '<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜>b<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜>',
    'deepseek-r1': '<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜>b<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜>'
                   '<think>\n',
    'glm4': '[gMASK]<sop><|user|>\na<|assistant|>\nb<|user|>\nc<|assistant|>',
    'phi-3': '<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\n',
    'phi-4': '<|im_start|>user<|im_sep|>a<|im_end|><|im_start|>assistant<|im_sep|>b<|im_end|>'
             '<|im_start|>user<|im_sep|>c<|im_end|><|im_start|>assistant<|im_sep|>',
    'baichuan2': '<reserved_106>a<reserved_107>b<reserved_106>c<reserved_107>',
    'solar': '### User:\na\n\n### Assistant:\nb\n\n### User:\nc\n\n### Assistant:\n',
}


@pytest.mark.parametrize('name', EXPECTED)
def test_conversations(name):
    assert ChatTemplateConfig(name).chat_template.messages2prompt(TALK) == EXPECTED[name]


@pytest.mark.parametrize(('name', 'start'), [
    ('internlm2', '<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na'),
    ('qwen3', '<|im_start|>system\nS<|im_end|>\n'),
    ('llama2', '[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST]'), ('gemma', '<start_of_turn>user\nS\n\na<end_of_turn>'),
    ('mistral', '[INST] S\n\na [/INST]'), ('vicuna', 'S USER: a ASSISTANT:'),
    ('llama3_1', f'<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{DATES}S<|eot_id|>'),
])
def test_system_messages(name, start):
    assert ChatTemplateConfig(name).chat_template.messages2prompt([SYSTEM, *TALK]).startswith(start)


@pytest.mark.parametrize('name', sorted(MODELS.module_dict))
def test_every_name_renders_and_can_be_changed(name):
    row = next((row for row in FORMATS if name in row.names), None)
    if row is None:
        pytest.fail(f'{name} was registered by a test')
    template = ChatTemplateConfig(name, user='USER!', eoh='!RESU', stop_words=['stop']).chat_template
    text = template.messages2prompt([SYSTEM, *TALK], tools=[TOOL], enable_thinking=False)
    assert '!RESU' in text and 'USER!' in text and template.stop_words == ['stop']
    assert 'a' in text and text.index('USER!') < text.rindex('!RESU')
    assert ChatTemplateConfig(name).chat_template.user != 'USER!', 'the table is not changed'


def test_qwen_tools_are_what_the_model_s_own_template_writes():
    from transformers.utils.chat_template_utils import render_jinja_template

    for messages in (TALK, [SYSTEM, *TALK], CALLED, [*CALLED, {'role': 'assistant', 'content': 'z'}, TALK[0]]):
        for tools in (None, [TOOL, TOOL]):
            parsed = [{**m, 'tool_calls': [{'function': {'name': 'f', 'arguments': {'x': 'é'}}}]}
                      if 'tool_calls' in m else m for m in messages]
            expected = render_jinja_template([parsed], tools=tools, chat_template=templates.QWEN25,
                                             add_generation_prompt=True)
            assert ChatTemplateConfig('qwen2d5').chat_template.messages2prompt(messages, tools=tools) == expected[0][0]


def test_internlm_tools():
    template = ChatTemplateConfig('internlm2').chat_template
    text = template.messages2prompt(CALLED, tools=[TOOL])
    described = json.dumps([TOOL['function']], ensure_ascii=False)
    assert text == (
        f'<|im_start|>system\n{INTERNLM}<|im_end|>\n<|im_start|>system name=<|plugin|>\n{described}<|im_end|>\n'
        '<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<|action_start|><|plugin|>\n'
        '{"name": "f", "parameters": {"x": "é"}}<|action_end|><|im_end|>\n'
        '<|im_start|>environment\nr1<|im_end|>\n<|im_start|>environment\nr2<|im_end|>\n<|im_start|>assistant\n')
    assert template.messages2prompt([SYSTEM, *TALK], tools=[TOOL]).startswith(
        '<|im_start|>system\nS<|im_end|>\n<|im_start|>system name=<|plugin|>\n')


def test_llama3_1_tools():
    text = ChatTemplateConfig('llama3_1').chat_template.messages2prompt(CALLED[:3], tools=[TOOL])
    assert 'Environment: ipython\nCutting Knowledge' in text
    assert json.dumps(TOOL, indent=4, ensure_ascii=False) + '\n\nq<|eot_id|>' in text
    assert '{"name": "f", "parameters": {"x": "é"}}<|eot_id|>' in text
    assert f'<|start_header_id|>ipython<|end_header_id|>\n\n"r1"<|eot_id|>{ANSWER}' in text


def test_reasoning():
    old = [TALK[0], {'role': 'assistant', 'content': '<think>\nhm\n</think>\n\nb'}, TALK[2]]
    for name in ('qwen3', 'qwq', 'deepseek-r1'):
        assert ChatTemplateConfig(name).chat_template.messages2prompt(old) == EXPECTED[name]
    assert ChatTemplateConfig('qwen3').chat_template.messages2prompt(TALK, enable_thinking=False).endswith(
        '<|im_start|>assistant\n<think>\n\n</think>\n\n')
    assert ChatTemplateConfig('deepseek-r1').chat_template.messages2prompt(TALK, enable_thinking=False).endswith(
        '<｜Assistant｜><think>\n\n</think>\n\n')


def test_code_llama_fills_in():
    template = ChatTemplateConfig('codellama', capability='infilling').chat_template
    assert template.get_prompt('def f():<FILL>return x') == '<PRE> def f(): <SUF>return x <MID>'
    assert template.messages2prompt([{'role': 'user', 'content': 'a<FILL>b'}]) == '<PRE> a <SUF>b <MID>'
    assert template.stop_words == ['<EOT>']
    assert CLASSES['CodeLlama'](suffix_first=True, capability='infilling').get_prompt('a<FILL>b') == (
        '<PRE> <SUF>b <MID> a')


@pytest.mark.parametrize(('path', 'name'), [
    ('/root/share/new_models/internlm3/internlm3-8b-instruct', 'internlm3'),
    ('/root/share/model_repos/internlm2-chat-7b', 'internlm2'), ('internlm/internlm2_5-7b-chat', 'internlm2'),
    ('internlm/internlm2-math-7b', 'internlm2'), ('internlm/internlm-chat-7b', 'internlm'),
    ('/root/share/new_models/InternVL3/InternVL3-1B', 'internvl2_5'), ('OpenGVLab/InternVL2_5-8B', 'internvl2_5'),
    ('OpenGVLab/InternVL2.5-8B-MPO', 'internvl2_5'), ('OpenGVLab/InternVL2-8B', 'internvl2-internlm2'),
    ('OpenGVLab/InternVL2-4B', 'internvl2-phi3'), ('internlm/internlm-xcomposer2-vl-7b', 'internlm-xcomposer2'),
    ('Qwen/Qwen3-8B', 'qwen3'), ('Qwen/Qwen2.5-7B-Instruct', 'qwen2d5'), ('Qwen/Qwen2.5-VL-7B', 'qwen2d5-vl'),
    ('Qwen/Qwen-7B-Chat', 'qwen'), ('Qwen/QwQ-32B', 'qwq'), ('Qwen/QwQ-32B-Preview', 'qwq_preview'),
    ('meta-llama/Llama-2-7b-chat-hf', 'llama2'), ('meta-llama/Meta-Llama-3-8B-Instruct', 'llama3'),
    ('meta-llama/Llama-3.1-8B-Instruct', 'llama3_1'), ('meta-llama/Llama-3.2-1B-Instruct', 'llama3_2'),
    ('codellama/CodeLlama-7b-Instruct-hf', 'codellama'), ('lmsys/vicuna-7b-v1.5', 'vicuna'),
    ('liuhaotian/llava-v1.5-7b', 'llava-v1'), ('liuhaotian/llava-v1.6-34b', 'llava-chatml'),
    ('mistralai/Mistral-7B-Instruct-v0.2', 'mistral'), ('mistralai/Mixtral-8x7B-Instruct-v0.1', 'mistral'),
    ('deepseek-ai/DeepSeek-R1-Distill-Qwen-7B', 'deepseek-r1'), ('deepseek-ai/DeepSeek-V3', 'deepseek-v3'),
    ('deepseek-ai/deepseek-coder-6.7b-instruct', 'deepseek-coder'), ('deepseek-ai/deepseek-llm-7b-chat', 'deepseek'),
    ('google/gemma-2-2b-it', 'gemma'), ('01-ai/Yi-34B-Chat', 'yi'), ('THUDM/glm-4-9b-chat', 'glm4'),
    ('THUDM/chatglm3-6b', 'chatglm3'), ('microsoft/Phi-3-mini-4k-instruct', 'phi-3'), ('microsoft/phi-4', 'phi-4'),
    ('/home/yi/models/qwen2.5-7b-instruct-awq', 'qwen2d5'), ('/data/llama/internlm2-chat-7b-4bit', 'internlm2'),
    ('~/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0123abcd', 'qwen3'),
])
def test_names_by_path(path, name):
    assert best_match_model(path) == name


def test_an_unknown_path_is_base_and_says_so(caplog):
    logger = get_logger()
    logger.addHandler(caplog.handler)
    try:
        assert best_match_model('/models/mystery') == 'base'
    finally:
        logger.removeHandler(caplog.handler)
    assert 'mystery' in caplog.text


def test_the_table_is_sound():
    names = [name for row in FORMATS for name in row.names]
    assert len(names) == len(set(names)) and len({row.cls for row in FORMATS}) == len(FORMATS)
    wanted = ('base llama internlm internlm2 internlm3 internvl-internlm2 internvl2-internlm2 internvl2_5 qwen qwen2d5 '
              'internlm-xcomposer2 qwen2d5-vl qwq qwen3 llama2 llama3 llama3_1 llama3_2 vicuna llava-v1 mistral '
              'mixtral deepseek deepseek-coder deepseek-r1 '
              'gemma yi chatglm glm4 phi-3 phi-4 solar puyu codellama '
              'baichuan2')
    assert set(wanted.split()) <= set(names)

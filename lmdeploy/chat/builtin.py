"""The named templates, as data: one row per format.

The first row whose pattern is found in a model's path gives the template's name, so special rows stand above general
ones (:func:`best_match_model`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from lmdeploy.chat import formats
from lmdeploy.chat.base import BaseChatTemplate
from lmdeploy.chat.registry import MODELS
from lmdeploy.log import get_logger


@dataclass(frozen=True, slots=True)
class Format:
    """One row of the table.

    Attributes:
        names: registered names; the first is the one that a match gives.
        cls: name of the class.
        match: pattern of model paths (lower case).
        boxes: arguments of :class:`BaseChatTemplate`.
        begin: the text that opens a sequence.
        bare: what stands in the place of a missing system message.
        opener: ``(assistant box, enable_thinking) -> text`` that asks for an answer.
        rewrite: see :mod:`lmdeploy.chat.formats`.
        named: ``(box, message) -> box``.
        more: boxes of further roles; None closes a role.
    """

    names: tuple[str, ...]
    cls: str
    match: str = ''
    boxes: dict[str, Any] = field(default_factory=dict)
    begin: str = ''
    bare: str = ''
    opener: Callable[[str, bool | None], str] | None = None
    rewrite: formats.Rewrite | None = None
    named: Callable[[str, dict], str] | None = None
    more: dict[str, tuple[str, str]] = field(default_factory=dict)


class NamedTemplate(BaseChatTemplate):
    """A template that is a row of the table; a subclass per row is made when this module is read."""

    format: Format

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**self.format.boxes, **kwargs})

    @classmethod
    def match(cls, model_path: str) -> str | None:
        row = cls.format
        return row.names[0] if row.match and re.search(row.match, model_path.lower()) else None

    def begin(self) -> str:
        return self.format.begin

    def bare(self) -> str:
        return self.format.bare

    def opener(self, enable_thinking: bool | None) -> str:
        change = self.format.opener
        return change(self.assistant, enable_thinking) if change else self.assistant

    def boxes(self) -> dict[str, tuple[str, str]]:
        return {**super().boxes(), **self.format.more}

    def named(self, before: str, message: dict) -> str:
        change = self.format.named
        return change(before, message) if change else before

    def rewrite(self, messages: list[dict], tools: list[dict] | None, sequence_start: bool) -> list[dict]:
        change = self.format.rewrite
        return change(messages, tools, self.meta_instruction if sequence_start else None) if change else messages


class CodeLlama(NamedTemplate):
    """Code Llama: chat as Llama 2, and filling in the text between two halves (``capability='infilling'``)."""

    def __init__(self, suffix_first: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.suffix_first = suffix_first
        if self.capability == 'infilling' and self.stop_words is None:
            self.stop_words = ['<EOT>']

    def get_prompt(self, prompt: str, sequence_start: bool = True) -> str:
        if self.capability != 'infilling' or '<FILL>' not in prompt:
            return super().get_prompt(prompt, sequence_start)
        before, after = prompt.split('<FILL>', 1)
        return f'<PRE> <SUF>{after} <MID> {before}' if self.suffix_first else f'<PRE> {before} <SUF>{after} <MID>'


def _chatml(meta: str | None = None, end: str = '<|im_end|>\n', separator: str = '\n',
            stop: tuple[str, ...] = ('<|im_end|>',), **more: str) -> dict[str, Any]:
    """Boxes of the ChatML family."""
    return {'system': '<|im_start|>system\n', 'meta_instruction': meta, 'eosys': end, 'user': '<|im_start|>user\n',
            'eoh': end, 'assistant': '<|im_start|>assistant\n', 'eoa': '<|im_end|>', 'separator': separator,
            'stop_words': list(stop), **more}


def _plain(user: str, eoh: str, assistant: str, eoa: str, stop: tuple[str, ...] | None = None, *,
           meta: str | None = None, **more: Any) -> dict[str, Any]:
    """Boxes without a system message of their own."""
    return {'meta_instruction': meta, 'user': user, 'eoh': eoh, 'assistant': assistant, 'eoa': eoa,
            'stop_words': list(stop) if stop else None, **more}


def _headers(start: str, end: str, close: str, meta: str | None, stop: tuple[str, ...]) -> dict[str, Any]:
    """Boxes of the Llama 3 family: the role between two header tokens."""
    box = {role: f'{start}{role}{end}\n\n' for role in ('system', 'user', 'assistant')}
    return {**box, 'meta_instruction': meta, 'eosys': close, 'eoh': close, 'eoa': close, 'stop_words': list(stop)}


INTERNLM = (
    'You are an AI assistant whose name is InternLM (书生·浦语).\n'
    '- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory '
    '(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n'
    '- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as '
    'English and 中文.')
XCOMPOSER = INTERNLM.replace('InternLM (书生·浦语)', 'InternLM-XComposer (浦语·灵笔)').replace(
    'a conversational language model', 'a multi-modality conversational language model') + (
    '\n- InternLM-XComposer (浦语·灵笔) is capable of comprehending and articulating responses effectively based on '
    'the provided image.')
INTERNVL1 = 'You are an AI assistant whose name is InternLM (书生·浦语).'
INTERNVL2 = ('你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, '
             '是一个有用无害的人工智能助手。')
INTERNVL25 = ('你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的'
              '多模态大语言模型。')
QWEN = 'You are a helpful assistant.'
QWEN25 = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'
VICUNA = ('A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, '
          "detailed, and polite answers to the user's questions.")
LLAVA = VICUNA.replace('user', 'human')
LLAMA2 = (
    'You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. '
    'Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. '
    'Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make '
    "any sense, or is not factually coherent, explain why instead of answering something not correct. If you don't "
    "know the answer to a question, please don't share false information.")
DEEPSEEK_CODER = (
    'You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you '
    'only answer questions related to computer science. For politically sensitive questions, security and privacy '
    'issues, and other non-computer science questions, you will refuse to answer\n')
DEEPSEEK_VL = (
    'You are a helpful language and vision assistant. You are able to understand the visual content that the user '
    'provides, and assist the user with a variety of tasks using natural language.')
ULTRA = ('A one-turn chat between a curious user and an artificial intelligence assistant. The assistant gives '
         "helpful, very detailed, and polite answers to the user's questions.")
CODEGEEX = ('你是一位智能编程助手，你叫CodeGeeX。你会为用户回答关于编程、代码、计算机方面的任何问题，并提供格式规范、'
            '可以执行、准确安全的代码，并在必要时提供详细的解释。')
DS_BEGIN, DS_END = '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'
DS_BOXES = _plain('<｜User｜>', '', '<｜Assistant｜>', DS_END, (DS_END,))
ENVIRONMENT = ('<|im_start|>environment\n', '<|im_end|>\n')
INTERNLM_MORE = {role: ENVIRONMENT for role in ('tool', 'function', 'environment')}
INTERNLM_STOPS = ('<|im_end|>', '<|action_end|>')
PHI3 = {**_plain('<|user|>\n', '<|end|>\n', '<|assistant|>\n', '<|end|>', ('<|end|>', '<|endoftext|>')),
        'system': '<|system|>\n', 'eosys': '<|end|>\n', 'separator': '\n'}
GLM4 = {**_plain('<|user|>\n', '', '<|assistant|>\n', '', ('<|user|>', '<|endoftext|>', '<|observation|>')),
        'system': '<|system|>\n'}
LLAMA3 = ('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>')
LLAMA3_STOPS = ('<|eot_id|>', '<|end_of_text|>')
IPYTHON = {'ipython': ('<|start_header_id|>ipython<|end_header_id|>\n\n', '<|eot_id|>')}
LLAMA2_BOXES = {'system': '[INST] <<SYS>>\n', 'eosys': '\n<</SYS>>\n\n', 'assistant': ' [/INST] ', 'eoa': '</s>',
                'separator': '<s>[INST] '}

FORMATS: tuple[Format, ...] = (
    # InternVL and InternLM
    Format(('internvl2_5',), 'InternVL2_5', r'internvl-?(2[._]5|3)', _chatml(INTERNVL25, stop=INTERNLM_STOPS),
           rewrite=formats.internlm_tools, named=formats.internlm_named, more=INTERNLM_MORE),
    Format(('internvl2-phi3',), 'InternVL2Phi3', r'internvl2-4b', {**PHI3, 'meta_instruction': INTERNVL2}),
    Format(('internvl2-internlm2',), 'InternVL2InternLM2',
           r'internvl2', _chatml(INTERNVL2, '<|im_end|>', '', ('<|im_start|>', '<|im_end|>'))),
    Format(('internvl-phi3',), 'InternVLPhi3', r'mini-internvl-chat-4b-v1-5',
           {**PHI3, 'meta_instruction': 'You are an AI assistant whose name is Phi-3.'}),
    Format(('internvl-zh-hermes2',), 'InternVLZhHermes2', r'internvl-chat.*v1-2',
           _chatml(INTERNVL2, stop=('<|im_end|>', '<|endoftext|>'))),
    Format(('internvl-internlm2',), 'InternVLInternLM2Chat', r'internvl.*v1-5',
           _chatml(INTERNVL1, '<|im_end|>', '', ('<|im_start|>', '<|im_end|>'))),
    Format(('internvl-zh',), 'InternVLZh', r'internvl.*v1-1',
           _plain('<human>: ', ' ', '<bot>: ', '</s>', ('</s>',), separator=' '), opener=formats.unspaced),
    Format(('internlm-xcomposer2', 'internlm-xcomposer2d5'), 'InternLMXComposer2Chat7B', r'internlm-?xcomposer2',
           {'system': '[UNUSED_TOKEN_146]system\n', 'meta_instruction': XCOMPOSER, 'eosys': '[UNUSED_TOKEN_145]\n',
            'user': '[UNUSED_TOKEN_146]user\n', 'eoh': '[UNUSED_TOKEN_145]\n',
            'assistant': '[UNUSED_TOKEN_146]assistant\n', 'eoa': '[UNUSED_TOKEN_145]\n',
            'stop_words': ['[UNUSED_TOKEN_145]']}),
    Format(('internlm3',), 'InternLM3', r'internlm3.*instruct', _chatml(INTERNLM, stop=INTERNLM_STOPS),
           rewrite=formats.internlm_tools, named=formats.internlm_named, more=INTERNLM_MORE),
    Format(('internlm2', 'internlm2-chat'), 'InternLM2Chat7B', r'internlm2.*(chat|math)|(chat|math).*internlm2',
           _chatml(INTERNLM, stop=INTERNLM_STOPS),
           rewrite=formats.internlm_tools, named=formats.internlm_named, more=INTERNLM_MORE),
    Format(('internlm', 'internlm-chat'), 'InternLMChat7B', r'internlm-?(chat|\d+b)',
           {'system': '<|System|>:', 'meta_instruction': INTERNLM + '\n', 'eosys': '\n', 'user': '<|User|>:',
            'eoh': '\n', 'assistant': '<|Bot|>:', 'eoa': '<eoa>', 'separator': '\n', 'stop_words': ['<eoa>']}),
    Format(('puyu',), 'Puyu', r'puyu', {}),
    # DeepSeek; above Qwen and Llama, which its distilled models are named after as well
    Format(('deepseek-r1',), 'DeepseekR1', r'deepseek-?r1', DS_BOXES, DS_BEGIN, opener=formats.think_choice,
           rewrite=formats.reasoning_dropped),
    Format(('deepseek-v3',), 'DeepseekV3', r'deepseek-?v(3|2[._]5)', DS_BOXES, DS_BEGIN),
    Format(('deepseek-vl2',), 'DeepSeekVL2', r'deepseek-?vl2', _plain(
        '<|User|>: ', '\n\n', '<|Assistant|>: ', DS_END, (DS_END,)), opener=formats.unspaced),
    Format(('deepseek-vl',), 'DeepSeekVL', r'deepseek-?vl', _plain(
        'User: ', '\n\n', 'Assistant: ', DS_END, (DS_END,), meta=DEEPSEEK_VL, eosys='\n\n'), opener=formats.unspaced),
    Format(('deepseek-coder',), 'DeepSeekCoder', r'deepseek-?coder', _plain(
        '### Instruction:\n', '\n', '### Response:\n', '\n<|EOT|>', ('<|EOT|>',), meta=DEEPSEEK_CODER,
        separator='\n')),
    Format(('deepseek', 'deepseek-chat'), 'Deepseek', r'deepseek', _plain(
        'User: ', '\n\n', 'Assistant: ', DS_END, (DS_END,), eosys='\n\n'), opener=formats.unspaced),
    # Qwen
    Format(('qwen3',), 'Qwen3', r'qwen-?3', _chatml(None), opener=formats.think_block, rewrite=formats.qwen3_tools),
    Format(('qwq_preview',), 'QwQPreview', r'qwq.*preview', _chatml(
        'You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step.'),
        rewrite=formats.qwen_tools),
    Format(('qwq',), 'QwQ', r'qwq', _chatml(None), opener=formats.think_open, rewrite=formats.qwen3_tools),
    Format(('qwen2d5-vl', 'qwen2-vl'), 'Qwen2d5VL', r'qwen-?2([._]5)?-?vl', _chatml(QWEN)),
    Format(('qwen2d5', 'qwen2.5'), 'Qwen2d5Chat', r'qwen-?2[._]5', _chatml(QWEN25), rewrite=formats.qwen_tools),
    Format(('qwen', 'qwen-chat'), 'Qwen7BChat', r'qwen', _chatml(QWEN)),
    # Llama
    Format(('llava-chatml',), 'LlavaChatML', r'llava.*34b', _chatml(
        'Answer the questions.', stop=('<|im_end|>', '<|endoftext|>'))),
    Format(('llava-v1',), 'Llavav1', r'llava.*(v1|vicuna)(?!.*(mistral|mixtral))', _plain(
        'USER: ', ' ', 'ASSISTANT: ', '</s>', ('</s>',), meta=LLAVA, eosys=' '), opener=formats.unspaced),
    Format(('vicuna',), 'Vicuna', r'vicuna', _plain(
        'USER: ', ' ', 'ASSISTANT: ', '</s>', ('</s>',), meta=VICUNA, eosys=' '), opener=formats.unspaced),
    Format(('wizardlm',), 'WizardLM', r'wizardlm', _plain(
        'USER: ', ' ', 'ASSISTANT: ', '</s>', ('</s>',), meta=VICUNA, eosys=' '), opener=formats.unspaced),
    Format(('codellama',), 'CodeLlama', r'code-?llama', {**LLAMA2_BOXES, 'meta_instruction': None}, bare='[INST] '),
    Format(('llama4',), 'Llama4', r'llama-?4', _headers(
        '<|header_start|>', '<|header_end|>', '<|eot|>', None, ('<|eot|>', '<|end_of_text|>')), '<|begin_of_text|>'),
    Format(('llama3_2',), 'Llama3_2', r'llama-?3[._]2', _headers(*LLAMA3, '', (*LLAMA3_STOPS, '<|eom_id|>')),
           '<|begin_of_text|>', rewrite=formats.llama3_tools, more=IPYTHON),
    Format(('llama3_1',), 'Llama3_1', r'llama-?3[._][13]', _headers(*LLAMA3, '', (*LLAMA3_STOPS, '<|eom_id|>')),
           '<|begin_of_text|>', rewrite=formats.llama3_tools, more=IPYTHON),
    Format(('llama3', 'llama-3'), 'Llama3', r'llama-?3', _headers(*LLAMA3, None, LLAMA3_STOPS), '<|begin_of_text|>'),
    Format(('llama2', 'llama-2', 'llama-2-chat'), 'Llama2', r'llama-?2', {**LLAMA2_BOXES, 'meta_instruction': LLAMA2},
           bare='[INST] '),
    # others
    Format(('mistral', 'mistral-instruct', 'mixtral', 'mixtral-instruct'), 'MistralChat', r'mi[sx]tral.*instruct',
           _plain('[INST] ', ' [/INST]', '', '</s>', ('</s>',)), rewrite=formats.system_in_user),
    Format(('gemma',), 'Gemma', r'gemma', _plain(
        '<start_of_turn>user\n', '<end_of_turn>\n', '<start_of_turn>model\n', '<end_of_turn>\n', ('<end_of_turn>',)),
        rewrite=formats.system_in_user),
    Format(('yi-vl',), 'YiVL', r'yi-?vl', _plain('### Human: ', '\n', '### Assistant:', '\n', ('###',))),
    Format(('yi', 'yi-chat', 'yi-200k', 'yi-34b'), 'Yi', r'(^|[^a-z])yi-', _chatml(
        None, stop=('<|im_end|>', '<|endoftext|>'))),
    Format(('codegeex4',), 'CodeGeeX4Chat', r'codegeex4', {**GLM4, 'meta_instruction': CODEGEEX}, '[gMASK]<sop>',
           opener=formats.unbroken),
    Format(('glm4',), 'Glm4Chat', r'glm-?4', GLM4, '[gMASK]<sop>', opener=formats.unbroken,
           more={role: ('<|observation|>\n', '') for role in ('tool', 'function', 'observation')}),
    Format(('chatglm3', 'chatglm'), 'ChatGLM3', r'chatglm', {
        **_plain('<|user|>\n ', '', '<|assistant|>\n ', '', ('<|user|>', '<|observation|>')),
        'system': '<|system|>\n '}, '[gMASK]sop', opener=lambda box, _: box.rstrip('\n '),
        more={role: ('<|observation|>\n ', '') for role in ('tool', 'function', 'observation')}),
    Format(('phi-4',), 'Phi4', r'phi-?4(?!.*mini)', {
        'system': '<|im_start|>system<|im_sep|>', 'meta_instruction': None, 'eosys': '<|im_end|>',
        'user': '<|im_start|>user<|im_sep|>', 'eoh': '<|im_end|>', 'assistant': '<|im_start|>assistant<|im_sep|>',
        'eoa': '<|im_end|>', 'stop_words': ['<|im_end|>', '<|endoftext|>']}),
    Format(('phi-3',), 'Phi3Instruct', r'phi-?3', PHI3),
    Format(('solar', 'solar-70b'), 'SOLAR', r'solar', _plain(
        '### User:\n', '\n\n', '### Assistant:\n', '\n\n', system='### System:\n', eosys='\n\n')),
    Format(('baichuan2',), 'Baichuan2', r'baichuan2.*chat', _plain('<reserved_106>', '', '<reserved_107>', '')),
    Format(('minicpmv-2d6', 'minicpm3'), 'MiniCPM', r'minicpm-?(v-?2[._]6|3)', _chatml(None)),
    Format(('ultracm', 'ultralm'), 'UltraChat', r'ultra[cl]m', _plain(
        'User: ', '</s>\n', 'Assistant: ', '</s>', ('</s>',), meta=ULTRA, system='User: ', eosys='</s>\n',
        separator='\n'), opener=formats.unspaced),
    Format(('molmo',), 'Molmo', r'molmo', _plain(' User: ', '', ' Assistant: ', '', ('<|endoftext|>',)),
           '<|endoftext|>', opener=formats.unspaced),
    Format(('cogvlm', 'cogvlm2'), 'CogVLM', r'cogvlm', _plain('Question: ', ' ', 'Answer: ', '\n'),
           opener=formats.unspaced),
    Format(('base', 'llama'), 'Base', '', {}),
)


def _register() -> None:
    for row in FORMATS:
        parent = CodeLlama if row.cls == 'CodeLlama' else NamedTemplate
        cls = type(row.cls, (parent,), {'format': row, '__module__': __name__, '__qualname__': row.cls,
                                        '__doc__': f'The {row.names[0]} format.'})
        CLASSES[row.cls] = cls
        MODELS.register_module(name=row.names, module=cls)


CLASSES: dict[str, type[NamedTemplate]] = {}
"""Class name to class, one for each row."""
_register()


def match_name(model_path: str) -> str | None:
    """The template name that the path of a model suggests: its folder's own name first, then the whole path.

    A folder in the hub's cache (``models--org--name/snapshots/...``) counts by the model's name.
    """
    parts = PurePath(model_path).parts
    cached = [part.split('--')[-1] for part in parts if part.startswith('models--')]
    for candidate in (*cached[-1:], *parts[-1:], model_path):
        for template in list(MODELS.module_dict.values()):
            match = getattr(template, 'match', None)
            name = match(candidate) if match else None
            if name is not None:
                return name
    return None


def best_match_model(query: str) -> str:
    """The name of the template that fits a model's path best; ``'base'``, with a warning, if none does."""
    name = match_name(query)
    if name is None:
        get_logger().warning('no chat template is known for the name %r; prompts go to the model as they are (the '
                             '"base" template). Choose one with ChatTemplateConfig(model_name=...)', query)
    return name or 'base'

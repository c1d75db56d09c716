"""Which template a model is rendered with.

Order: what the user configured; the template that the model's own files carry; a named template that the folder's
name suggests; ``base``. The model's own goes before the name, because a renamed folder must not change the answers.
InternVL models are the exception: their named formats carry a system message that their own templates lack.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from lmdeploy.chat.base import BaseModel
from lmdeploy.chat.builtin import MODELS, match_name
from lmdeploy.chat.config import ChatTemplateConfig
from lmdeploy.chat.template import ChatTemplate
from lmdeploy.chat.trust import ControlStrings
from lmdeploy.errors import ConfigError, TemplateError
from lmdeploy.log import get_logger

END_OF_TURN = ('<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<|eot|>', '<end_of_turn>', '<turn|>', '<|end|>',
               '<|endofturn|>', '[|endofturn|]', '<|END_OF_TURN_TOKEN|>', '<｜end▁of▁sentence｜>', '<|return|>',
               '<|call|>', '<|action_end|>', '<|end_of_text|>', '<|observation|>', '<eoa>', '</s>')
INTERNVL = {'internvl2_5': 'internvl2_5', 'internlm2-chat': 'internvl2-internlm2', 'phi3-chat': 'internvl2-phi3',
            'Hermes-2': 'internvl-zh-hermes2'}
"""``template`` of an InternVL model's config.json to the name here."""


class TokenizerFacts(Protocol):
    """What is asked of a tokenizer here."""

    chat_template: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    added_tokens: dict[str, int]
    special_tokens: dict[str, int]
    control_tokens: dict[str, int]

    def token_piece(self, token: int) -> str: ...


def resolve_template(model_path: str, tokenizer: TokenizerFacts,
                     config: ChatTemplateConfig | None = None) -> ChatTemplate:
    """The template of a model.

    Args:
        model_path: its folder or file.
        tokenizer: its :class:`lmdeploy.tokenizer.Tokenizer`.
        config: what the user chose; None: nothing.

    Raises:
        ConfigError: LMD-228, ``config`` is something else.
        TemplateError: LMD-172 to LMD-174 and LMD-178, the model's own template is not usable; LMD-185, ``'hf'`` was
            asked for and there is none.
    """
    if config is not None and not isinstance(config, ChatTemplateConfig):
        raise ConfigError('LMD-228', field='chat_template_config', given=type(config).__name__,
                          wanted='a ChatTemplateConfig')
    strings = ControlStrings(tokenizer.control_tokens, tokenizer.special_tokens)
    if config is not None and config.model_name != 'hf':
        return ChatTemplate(config.model_name, config.chat_template, strings, add_bos=True)
    wanted = None if config is not None else _internvl(model_path)
    if wanted is None and tokenizer.chat_template:
        return ChatTemplate('hf', _own(model_path, tokenizer, config), strings, add_bos=False)
    if config is not None:
        raise TemplateError('LMD-185', source=Path(model_path).name)
    name = wanted or match_name(model_path)
    if name is None:
        name = 'base'
        get_logger().warning('%s carries no chat template, and its name suggests none: prompts go to the model as they '
                             'are. Choose one with chat_template_config (names: %s)', Path(model_path).name,
                             ', '.join(sorted(MODELS.module_dict)))
    elif wanted is None:
        get_logger().info('%s carries no chat template; its name suggests %r', Path(model_path).name, name)
    return ChatTemplate(name, MODELS.get(name)(), strings, add_bos=True)


def _internvl(model_path: str) -> str | None:
    """The named format of an InternVL model; None for others."""
    try:
        config: Any = json.loads((Path(model_path) / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):  # a file without a folder, or a folder whose errors others report
        return None
    architectures = config.get('architectures') if isinstance(config, dict) else None
    if not isinstance(architectures, list) or not str(*architectures[:1]).startswith('InternVL'):
        return None
    name = match_name(model_path)
    if name is not None and name.startswith('internvl'):
        return name
    return INTERNVL.get(str(config.get('template')), 'internvl2_5')


def _own(model_path: str, tokenizer: TokenizerFacts, config: ChatTemplateConfig | None) -> BaseModel:
    from lmdeploy.chat.hf import HFChatTemplate

    source = tokenizer.chat_template or ''
    names = {'bos_token': tokenizer.bos_token_id, 'eos_token': tokenizer.eos_token_id}
    texts = {token: text for text, token in tokenizer.added_tokens.items()}
    special = {name: texts.get(token) or tokenizer.token_piece(token) for name, token in names.items()
               if token is not None}
    stops = config.stop_words if config is not None and config.stop_words else _stops(source, special, tokenizer)
    template = HFChatTemplate(source, special, source=Path(model_path).name, stop_words=stops)
    if config is not None and config.capability is not None:
        template.capability = config.capability
    return template


def _stops(source: str, special: dict[str, str], tokenizer: TokenizerFacts) -> list[str]:
    """The end of a text, and the ends of turns that the template writes, as far as they are tokens."""
    found = [special['eos_token']] if special.get('eos_token') else []
    return found + [text for text in END_OF_TURN
                    if text in source and text in tokenizer.added_tokens and text not in found]

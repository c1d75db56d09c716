"""Chat templates: the public path. The named templates' classes (``InternLM2Chat7B``, ``Llama3``, ...) are here too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmdeploy.chat.base import BaseChatTemplate, BaseModel
from lmdeploy.chat.builtin import CLASSES, best_match_model
from lmdeploy.chat.config import ChatTemplateConfig
from lmdeploy.chat.messages import get_text
from lmdeploy.chat.registry import MODELS

if TYPE_CHECKING:
    from lmdeploy.chat.hf import HFChatTemplate

__all__ = ['MODELS', 'BaseChatTemplate', 'BaseModel', 'ChatTemplateConfig', 'HFChatTemplate', 'best_match_model',
           'get_text', 'random_uuid']


def random_uuid() -> str:
    """A random identifier of 32 hexadecimal digits."""
    import uuid

    return uuid.uuid4().hex


def __getattr__(name: str) -> Any:
    if name in CLASSES:
        return CLASSES[name]
    if name == 'HFChatTemplate':  # jinja2 is loaded for it only
        from lmdeploy.chat.hf import HFChatTemplate

        return HFChatTemplate
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*__all__, *CLASSES})

"""Messages to prompt text: named templates, users' own, and the jinja templates that models carry."""

from __future__ import annotations

from lmdeploy.chat.base import BaseChatTemplate, BaseModel, Segment
from lmdeploy.chat.config import ChatTemplateConfig
from lmdeploy.chat.registry import MODELS
from lmdeploy.chat.resolve import resolve_template
from lmdeploy.chat.template import ChatTemplate

__all__ = ['MODELS', 'BaseChatTemplate', 'BaseModel', 'ChatTemplate', 'ChatTemplateConfig', 'Segment',
           'resolve_template']

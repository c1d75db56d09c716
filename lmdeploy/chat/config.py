"""ChatTemplateConfig: a template by name, with some of its boxes changed; and its JSON form."""

from __future__ import annotations

import dataclasses
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmdeploy.chat.base import BaseChatTemplate, BaseModel
from lmdeploy.chat.builtin import MODELS
from lmdeploy.errors import ConfigError, TemplateError
from lmdeploy.log import get_logger


@dataclass
class ChatTemplateConfig:
    """Which chat template to use, and what to change in it.

    Args:
        model_name: a registered name (``lmdeploy.model.MODELS``), or ``'hf'`` for the model's own template. An
            unknown name stands for a plain box template made of the fields below.
        system, meta_instruction, eosys, user, eoh, assistant, eoa, tool, eotool, separator: boxes, see
            :class:`BaseChatTemplate`; None leaves the template's own.
        eoh: the text after a user message.
        capability: ``'completion'``, ``'infilling'``, ``'chat'`` or ``'python'``.
        stop_words: texts that end an answer.
    """

    model_name: str
    system: str | None = None
    meta_instruction: str | None = None
    eosys: str | None = None
    user: str | None = None
    eoh: str | None = None
    assistant: str | None = None
    eoa: str | None = None
    tool: str | None = None
    eotool: str | None = None
    separator: str | None = None
    capability: Literal['completion', 'infilling', 'chat', 'python'] | None = None
    stop_words: list[str] | None = None

    def changes(self) -> dict[str, Any]:
        """The fields that are set, without the name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != 'model_name'}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def chat_template(self) -> BaseModel:
        """The template. A class whose constructor takes no options works as long as no field is set.

        Raises:
            ConfigError: LMD-182 or LMD-186, a field has no possible value.
        """
        for name, value in {'model_name': self.model_name, **self.changes()}.items():
            wanted = _wanted(name, value)
            if wanted:
                raise ConfigError('LMD-186', field=name, given=type(value).__name__, wanted=wanted)
        cls = MODELS.get(self.model_name)
        if cls is None:
            get_logger().warning('no chat template is named %r; a plain template is made of the given fields. '
                                 'Registered names: %s', self.model_name, ', '.join(sorted(MODELS.module_dict)))
            return BaseChatTemplate(**self.changes())
        return cls(**self.changes())

    def to_json(self, path: str | Path | None = None) -> str:
        """The JSON text; also written to ``path`` if one is given."""
        text = json.dumps(dataclasses.asdict(self), indent=4, ensure_ascii=False)
        if path is not None:
            Path(path).write_text(text, encoding='utf-8')
        return text

    @classmethod
    def from_json(cls, path_or_json: str | Path) -> ChatTemplateConfig:
        """Read a JSON file, or a text that is JSON itself.

        Without ``model_name`` a name is made up; a name that is not registered is registered as a plain box template.

        Raises:
            TemplateError: LMD-171, unreadable or not what is expected.
        """
        text = str(path_or_json)
        inline = text.lstrip().startswith('{')
        try:
            data = json.loads(text if inline else Path(text).read_text(encoding='utf-8'))
        except (OSError, ValueError, RecursionError) as error:
            raise _bad(text, str(error)) from error
        fields = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, dict):
            raise _bad(text, f'it is a {type(data).__name__}, not an object')
        unknown = sorted(set(data) - fields)
        if unknown:
            raise _bad(text, f'unknown fields: {", ".join(unknown)}')
        for name, value in data.items():
            wanted = _wanted(name, value) if value is not None else None
            if wanted:
                raise _bad(text, f'{name} is a {type(value).__name__}, not {wanted}')
        name = data.pop('model_name', None) or uuid.uuid4().hex
        if name not in MODELS and name != 'hf':
            MODELS.register_module(name=name, module=BaseChatTemplate)
        return cls(model_name=name, **data)

    @classmethod
    def from_option(cls, value: str) -> ChatTemplateConfig:
        """What a command line says: a registered name, a JSON file, or a JSON text.

        Raises:
            TemplateError: LMD-170, nothing of that; LMD-171, a file or text that cannot be used.
        """
        if value in MODELS or value == 'hf':
            return cls(model_name=value)
        if value.lstrip().startswith('{') or Path(value).is_file():
            return cls.from_json(value)
        raise TemplateError('LMD-170', name=value, names=', '.join(sorted(MODELS.module_dict)))


def _wanted(field: str, value: Any) -> str | None:
    """What a field must be, if ``value`` is not that."""
    if field == 'stop_words':
        listed = isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)
        return None if listed else 'a list of texts'
    return None if isinstance(value, str) else 'a text'


def _bad(source: str, reason: str) -> TemplateError:
    fields = ', '.join(f.name for f in dataclasses.fields(ChatTemplateConfig) if f.name != 'model_name')
    return TemplateError('LMD-171', source=repr(source[:80]), reason=reason, fields=fields)

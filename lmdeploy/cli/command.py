"""The command line of a server that serves what Python arguments say: the inverse of reading it."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from lmdeploy.cli.api_server import ALL_ENGINE_OPTIONS
from lmdeploy.errors import ConfigError
from lmdeploy.messages import PytorchEngineConfig, TurbomindEngineConfig

if TYPE_CHECKING:
    from lmdeploy.model import ChatTemplateConfig


def engine_flags(config: TurbomindEngineConfig | PytorchEngineConfig) -> list[str]:
    """The flags that spell a config.

    Raises:
        ConfigError: LMD-585, a field that is not its default and has no flag.
    """
    pytorch = isinstance(config, PytorchEngineConfig)
    options = {option.pytorch if pytorch else option.turbomind: option for option in ALL_ENGINE_OPTIONS}
    flags = ['--backend', 'pytorch' if pytorch else 'turbomind']
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        option = options.get(field.name)
        if field.name == 'enable_metrics' and value is False:
            flags.append('--disable-metrics')
        elif option is None or isinstance(value, bool) and not value:
            raise ConfigError('LMD-585', field=field.name, config=type(config).__name__)
        else:
            flags += [option.flag, *_words(value)]
    return flags


def _words(value: Any) -> list[str]:
    if value is True:
        return []
    if isinstance(value, dict):
        return [f'{name}={path}' for name, path in value.items()]
    return [str(value)]


def template_flags(config: ChatTemplateConfig | None) -> list[str]:
    """The flag that spells a chat template: its name, and what is changed in it."""
    if config is None:
        return []
    changes = config.changes()
    if not changes:
        return ['--chat-template', config.model_name]
    return ['--chat-template', json.dumps({'model_name': config.model_name, **changes}, ensure_ascii=False)]

"""What a server logs, and how: lines for readers, or JSON objects for machines."""

from __future__ import annotations

from lmdeploy import log
from lmdeploy.config.options import log_level_of
from lmdeploy.errors import ConfigError


def configure(level: str, form: str) -> None:
    """How much is logged, by the name of a level, and how: ``'text'`` or ``'json'``.

    Raises:
        ConfigError: LMD-221, there is no such level; LMD-527, no such form.
    """
    log.set_level(log_level_of(level))
    if form not in ('text', 'json'):
        raise ConfigError('LMD-527', option='--log-format', value=form, reason='choose text or json')
    if form == 'json':
        for handler in log.get_logger().handlers:
            handler.setFormatter(log.JsonFormatter())

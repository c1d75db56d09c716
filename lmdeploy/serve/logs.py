"""What a server logs, and how: lines for readers, or JSON objects for machines."""

from __future__ import annotations

import datetime
import json
import logging

from lmdeploy import log
from lmdeploy.config.options import log_level_of
from lmdeploy.errors import ConfigError


class JsonFormatter(logging.Formatter):
    """One line per record: time (UTC), level, place, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        entry = {'time': time.isoformat(timespec='milliseconds'), 'level': record.levelname,
                 'where': f'{record.filename}:{record.lineno}', 'message': record.getMessage()}
        if record.exc_info:
            entry['traceback'] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


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
            handler.setFormatter(JsonFormatter())

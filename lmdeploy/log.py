"""The package's one logger, in LMDeploy's line format."""

from __future__ import annotations

import datetime
import json
import logging

FORMAT = '%(asctime)s - lmdeploy - %(levelname)s - %(filename)s:%(lineno)d - %(message)s'


def get_logger() -> logging.Logger:
    """The ``lmdeploy`` logger; a stderr handler is attached once, unless the application configured one."""
    logger = logging.getLogger('lmdeploy')
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    return logger


def set_level(level: str | int) -> None:
    """Set the level by name (``'WARNING'``) or number."""
    get_logger().setLevel(level.upper() if isinstance(level, str) else level)


def json_line(seconds: float, level: str, where: str, message: str, traceback: str = '') -> str:
    """A record of the log for machines: one JSON object.

    Args:
        seconds: Unix time.
    """
    time = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    entry = {'time': time.isoformat(timespec='milliseconds'), 'level': level, 'where': where, 'message': message}
    if traceback:
        entry['traceback'] = traceback
    return json.dumps(entry, ensure_ascii=False)


class JsonFormatter(logging.Formatter):
    """One :func:`json_line` per record."""

    def format(self, record: logging.LogRecord) -> str:
        return json_line(record.created, record.levelname, f'{record.filename}:{record.lineno}', record.getMessage(),
                         self.formatException(record.exc_info) if record.exc_info else '')

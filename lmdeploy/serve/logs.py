"""Log lines as JSON objects, for machines."""

from __future__ import annotations

import datetime
import json
import logging


class JsonFormatter(logging.Formatter):
    """One line per record: time (UTC), level, place, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        entry = {'time': time.isoformat(timespec='milliseconds'), 'level': record.levelname,
                 'where': f'{record.filename}:{record.lineno}', 'message': record.getMessage()}
        if record.exc_info:
            entry['traceback'] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)

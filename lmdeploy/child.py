"""A process of ours inside itself: it lives as long as its parent, and logs through it."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def outlive_nothing(parent: int) -> None:
    """End with the process ``parent``, and not by signals to its whole group, which are left to it.

    SIGUSR1 shows the stacks of all threads.
    """
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)


class _Lines(logging.Formatter):
    """``<level>text``, line by line: the parent logs them anew."""

    def format(self, record: logging.LogRecord) -> str:
        return '\n'.join(f'<{record.levelno}>{line}' for line in super().format(record).splitlines())


def log_to_parent() -> None:
    """Write the log to standard error in lines that the parent reads."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines('%(message)s'))
    logger = logging.getLogger('lmdeploy')
    logger.handlers[:] = [handler]
    logger.propagate = False

"""The package's one logger, in LMDeploy's line format."""

from __future__ import annotations

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

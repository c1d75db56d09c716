"""Listener: a socket whose server outlives the end of its file descriptors."""

from __future__ import annotations

import errno
import socket
import sys

from lmdeploy.log import get_logger

STARVED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
RESERVE = 128
"""Descriptors for everything that is no connection of a client."""


class Listener(socket.socket):
    """A listening socket for asyncio, which pauses for a second when no connection can be accepted for want of
    descriptors, but in older versions of Python first tries as often as the backlog is long, each time with a line in
    the log and a timer of its own. Here it fails once per pause, and the log has one line when it begins and one when
    it is over.
    """

    _starved = False  # since the last connection that was accepted
    _told = False  # in this turn of the event loop

    def accept(self) -> tuple[socket.socket, object]:
        """The next connection.

        Raises:
            OSError: there are no descriptors left.
            BlockingIOError: nobody waits, or the same was said a moment ago.
        """
        if self._told:
            self._told = False
            raise BlockingIOError(errno.EAGAIN, 'no descriptors; wait')
        try:
            accepted = super().accept()
        except OSError as error:
            if error.errno in STARVED:
                if not self._starved:
                    get_logger().error('no new connections: %s. The limit is that of "ulimit -n"', error.strerror)
                self._starved = self._told = True
            raise
        if self._starved:
            self._starved = False
            get_logger().warning('connections are accepted again')
        return accepted


def is_starvation(report: dict[str, object]) -> bool:
    """Whether what an event loop reports is a failed ``accept`` that the listener has told already."""
    error = report.get('exception')
    return isinstance(error, OSError) and error.errno in STARVED and 'accept' in str(report.get('message'))


def descriptors(wanted: int) -> int:
    """How many descriptors the process may have, after asking the system for ``wanted``."""
    if sys.platform == 'win32':
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):  # a system with a lower limit of its own
        return soft
    return most

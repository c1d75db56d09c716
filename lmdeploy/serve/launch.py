"""A server that a program starts for itself: a child process, and the client that owns it."""

from __future__ import annotations

import atexit
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import lmdeploy
from lmdeploy import errors
from lmdeploy.config.env import child_environment
from lmdeploy.errors import EngineDead, LmdeployError
from lmdeploy.serve.fetch import ServerConnectionError
from lmdeploy.serve.openai.api_client import APIClient
from lmdeploy.texts.source import Phrase

PROGRAM = (sys.executable, '-m', 'lmdeploy.cli.attached')
POLL_SECONDS = 0.1
CLOSE_SECONDS = 20.0  # the child gives itself less


class ServerProcess:
    """A running ``lmdeploy serve api_server``. It ends when :meth:`stop` is called, and when this process ends.

    Args:
        command: the arguments of ``lmdeploy``.
        keys: of the server; they go through the environment, which ``ps`` does not show.
    """

    def __init__(self, command: Sequence[str], keys: Sequence[str] = ()) -> None:
        self._sock, other = socket.socketpair()
        environment = child_environment(LMDEPLOY_API_KEYS=','.join(keys)) if keys else child_environment()
        with other:
            # -m finds the same package as this process has; the child goes back to this folder. It is in no terminal's
            # foreground group, so that Ctrl-C is this process's alone. Answers of a script on stdout stay its own.
            self._process = subprocess.Popen(
                [*PROGRAM, str(other.fileno()), str(os.getpid()), os.getcwd(), *command], stdin=subprocess.DEVNULL,
                stdout=2, pass_fds=(other.fileno(),), start_new_session=True, env=environment,
                cwd=Path(lmdeploy.__file__).parent.parent)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status; None: it runs."""
        return self._process.poll()

    def error(self) -> LmdeployError:
        """Why it ended: its own error, with its class and code, if it told one."""
        self._sock.settimeout(1.0)
        told = bytearray()
        try:
            while piece := self._sock.recv(1 << 16):
                told += piece
        except OSError:  # a process that it left behind may hold the other end
            pass
        return revive(bytes(told)) or EngineDead('LMD-584', status=self.status)

    def stop(self) -> None:
        """End it, and wait. Running requests may finish for a few seconds. Safe to call twice."""
        self._sock.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ServingClient(APIClient):
    """A client that has started its server and ends it: by :meth:`close`, as a context manager, or with the program.

    Args:
        process: the server; :meth:`wait` says when it serves.
    """

    def __init__(self, process: ServerProcess, api_server_url: str, api_key: str | None = None, *,
                 tls: ssl.SSLContext | None = None) -> None:
        super().__init__(api_server_url, api_key, tls=tls)
        self.process = process
        atexit.register(self.close)

    def wait(self) -> None:
        """Wait until it serves.

        Raises:
            LmdeployError: the error of the server, which has ended.
        """
        while self.process.status is None:
            try:
                if self.health()[0]:
                    return
            except ServerConnectionError:  # it does not listen yet
                pass
            time.sleep(POLL_SECONDS)
        raise self.process.error()

    def close(self) -> None:
        atexit.unregister(self.close)
        self.process.stop()


def tell(error: LmdeployError) -> bytes:
    """An error for :func:`revive` in another process: its class, its code, its parameters."""
    params = {name: value._asdict() if isinstance(value, Phrase) else value for name, value in error.params.items()}
    return json.dumps([type(error).__name__, error.code, params], default=str).encode()


def revive(told: bytes) -> LmdeployError | None:
    """An error of the child as it was there; None: what it told is none."""
    try:
        name, code, params = json.loads(told)
        kind = getattr(errors, name, LmdeployError)
        return kind(code, **{key: Phrase(**value) if isinstance(value, dict) else value
                             for key, value in params.items()})
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def trust(certificate: str | None) -> ssl.SSLContext:
    """Trust in one certificate, whatever name it has: the server is known by its key."""
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context

"""Sandbox: grammars are compiled once in a process that may crash, hang or eat memory without harm.

Checks before it keep such grammars out as far as they are known; this is for those that are not. A process tries one
grammar at a time; one that does not answer in time is killed, and the next grammar gets a new one.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import lmdeploy
from lmdeploy.errors import RequestError
from lmdeploy.grammar.automata import load
from lmdeploy.grammar.formats import Source
from lmdeploy.log import get_logger

SECONDS = 2.0  # for one grammar
START_SECONDS = 60.0  # for a process to start, on a very busy machine
SELECTABLE = sys.platform != 'win32'  # pipes can be waited for


class Sandbox:
    """Tries grammars out. Thread-safe; as many processes run as threads ask at once, and none before the first does."""

    def __init__(self) -> None:
        self._idle: list[_Process] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop_all, self._idle)

    def check(self, source: Source) -> None:
        """Refuse a grammar that cannot be compiled within time and memory.

        Raises:
            RequestError: LMD-325 (the reason), LMD-326 (too complex), LMD-327 (the package is missing).
        """
        load()
        request = json.dumps([source.kind, source.text]).encode() + b'\n'
        process = self._take()
        try:
            try:
                answer = process.ask(request, SECONDS)
            except _Ended:
                process.stop()
                process = _Process()  # the first may have ended by itself, being idle; a second ends by the grammar
                answer = process.ask(request, SECONDS)
        except (_Ended, _Late) as error:
            process.stop()
            get_logger().warning('a grammar was refused: the process that compiled it %s', error)
            raise RequestError('LMD-326', seconds=SECONDS) from error
        with self._lock:
            self._idle.append(process)
        reason = json.loads(answer)
        if reason is not None:
            raise RequestError('LMD-325', reason=reason)

    def _take(self) -> _Process:
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.alive:
                    return process
                process.stop()
        return _Process()

    def close(self) -> None:
        """End the processes."""
        self._finalizer()


class _Ended(Exception):
    """A process ended before it answered."""


class _Late(Exception):
    """A process did not answer in time."""


class _Process:
    """One child, started and ready."""

    def __init__(self) -> None:
        root = Path(lmdeploy.__file__).parent.parent
        self._child = subprocess.Popen([sys.executable, '-m', 'lmdeploy.grammar.probe'], cwd=root, bufsize=0,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._rest = b''
        try:
            self._line(START_SECONDS)
        except (_Ended, _Late) as error:
            self.stop()
            raise RequestError('LMD-325', reason=f'the process that compiles grammars {error}') from error

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def ask(self, request: bytes, seconds: float) -> bytes:
        """Send a line, and the line that comes back."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(request)
        except OSError as error:
            raise _Ended('had ended') from error
        return self._line(seconds)

    def _line(self, seconds: float) -> bytes:
        """The next line of its output, which it writes at once."""
        assert self._child.stdout is not None
        pipe = self._child.stdout.fileno()
        while b'\n' not in self._rest:
            if SELECTABLE and not select.select([pipe], [], [], seconds)[0]:
                raise _Late(f'took more than {seconds} s')
            data = os.read(pipe, 1 << 16)
            if not data:
                raise _Ended(f'ended with status {self._child.wait()}')
            self._rest += data
        line, _, self._rest = self._rest.partition(b'\n')
        return line

    def stop(self) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            pipe.close()


def _stop_all(processes: list[_Process]) -> None:
    while processes:
        processes.pop().stop()

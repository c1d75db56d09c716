"""The engine's process seen from its parent: started, listened to, its health and its crashes judged."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lmdeploy
from lmdeploy.config.env import child_environment
from lmdeploy.log import get_logger

PROGRAM = (sys.executable, '-m', 'lmdeploy.engine.process')
TAIL_LINES, TAIL_CHARS = 40, 500
CAUSE_LINES = 3
_LINE = re.compile(r'<(\d\d)>(.*)')
_UNPRINTABLE = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]')


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits, in seconds, and how crashes are counted.

    Attributes:
        hang: without a finished step the engine hangs after this, or ``hang_factor`` times the 99th percentile of its
            steps if that is longer;
        patience: times this much for the first ``warm_steps`` steps, which may compile kernels, and on a CPU, where one
            step of a long prompt takes as long as hundreds of others.
        load: for a model to load.
        close: for the engine to end by itself.
        first_delay, last_delay: before a restart; doubled from crash to crash.
        crashes, window: so many crashes within such a time are the end.
    """

    hang: float = 30.0
    hang_factor: float = 20.0
    patience: float = 10.0
    warm_steps: int = 32
    load: float = 3600.0
    close: float = 5.0
    first_delay: float = 1.0
    last_delay: float = 30.0
    crashes: int = 3
    window: float = 60.0


class Child:
    """A started engine process.

    A thread of its own starts it, reads its output until the end, and then ends itself: on Linux the child is bound to
    the life of the thread that started it.

    Attributes:
        sock: our end of the socket pair.
    """

    def __init__(self, program: Sequence[str]) -> None:
        self.sock, self._other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None  # why it did not start
        self._started, self._silent = threading.Event(), threading.Event()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._thread = threading.Thread(target=self._run, name='lmdeploy-engine-process', daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # -m finds the same package as this process has; the child is in no terminal's foreground group
        command = [*self._program, str(self._other.fileno()), str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=(self._other.fileno(),), start_new_session=True, env=child_environment(),
                cwd=Path(lmdeploy.__file__).parent.parent)
        except OSError as error:
            self._error = error
        finally:
            self._other.close()
            self._started.set()
        if self._process is not None:
            assert self._process.stdout is not None
            with self._process.stdout as output:
                for line in iter(lambda: output.readline(1 << 16), b''):
                    self._hear(line.decode(errors='replace').rstrip())
            self._silent.set()
            self._process.wait()

    def _hear(self, line: str) -> None:
        found = _LINE.fullmatch(line)
        level, text = (int(found[1]), found[2]) if found else (logging.WARNING, line)
        text = _UNPRINTABLE.sub('?', text)
        if text.strip():
            self._tail.append(text[:TAIL_CHARS])
        get_logger().log(level, 'engine: %s', text)

    @property
    def pid(self) -> int | None:
        """Its process id; None: it did not start."""
        self._started.wait()
        return None if self._process is None else self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process is no more. Waits until it has been started."""
        self._started.wait()
        return self._process is None or self._process.poll() is not None

    @property
    def heard(self) -> bool:
        """Whether it has ended and its last output was read."""
        return self.ended and (self._process is None or self._silent.is_set())

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the process and of its output; False: it still runs."""
        self._started.wait()
        if self._process is None:
            return True
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._silent.wait(0.2)  # what it said last; a child of its own may hold the pipe open
        return True

    def cause(self) -> str:
        """How it ended, and the last lines it wrote if it did not end by a signal of ours."""
        if self._process is None:
            return f'it could not be started: {self._error}'
        status = self._process.poll()
        if status is None:
            return 'it neither answers nor ends'
        how = f'exit status {status}' if status >= 0 else f'killed by {signal.Signals(-status).name}'
        lines = ' | '.join(list(self._tail)[-CAUSE_LINES:])
        return f'{how}; its last lines: {lines}' if lines else how

    def dump_stacks(self) -> None:
        """Let it write the stacks of its threads to its output."""
        self._signal(signal.SIGUSR1)

    def kill(self) -> None:
        """End it at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        self._started.wait()
        if self._process is not None:
            self._process.send_signal(number)

    def stop(self, seconds: float) -> None:
        """Ask it to end by closing the connection, wait, then kill it. Safe to call twice."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is closed already
            pass
        if not self.wait(seconds):
            get_logger().warning('the engine process did not end within %g s and is killed', seconds)
            self.kill()
            self.wait(seconds)
        self.sock.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(1.0)


class StepWatch:
    """Tells a hanging engine from a busy one: the time since a step last ended, against the times of earlier steps.

    Args:
        patient: the device is one whose steps may differ much (see :attr:`Limits.patience`).
    """

    def __init__(self, limits: Limits, *, patient: bool) -> None:
        self._limits, self._patient = limits, patient
        self._times: deque[float] = deque(maxlen=512)
        self._steps = 0
        self._since: float | None = None  # of the last progress; None: there is no work

    def progress(self, steps: int, seconds: float) -> None:
        """The engine has now run ``steps`` steps, the slowest new one took ``seconds``."""
        if steps != self._steps:
            self._steps = steps
            self._times.append(seconds)
            if self._since is not None:
                self._since = time.monotonic()

    def work(self, there_is: bool) -> None:
        """Whether requests wait for the engine from now on."""
        if not there_is:
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()

    def excuse(self) -> None:
        """The watcher itself was stopped: begin anew."""
        if self._since is not None:
            self._since = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds without progress while there is work."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def limit(self) -> float:
        """The age at which the engine hangs."""
        limits = self._limits
        times = sorted(self._times)
        usual = times[min(len(times) - 1, int(len(times) * 0.99))] if times else 0.0
        patient = self._patient or len(times) < limits.warm_steps
        return max(limits.hang, limits.hang_factor * usual) * (limits.patience if patient else 1.0)

    @property
    def hangs(self) -> bool:
        """Whether to give the engine up."""
        return self.age > self._limits.hang and self.age > self.limit


class CrashLog:
    """When to start again after a crash, and when not."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._times: deque[float] = deque()
        self._delay = 0.0

    def crashed(self) -> float | None:
        """A crash: the seconds to wait before the next start; None: give up."""
        limits, now = self._limits, time.monotonic()
        while self._times and now - self._times[0] > limits.window:
            self._times.popleft()
        if not self._times:
            self._delay = 0.0
        self._times.append(now)
        if len(self._times) >= limits.crashes:
            return None
        self._delay = min(max(2 * self._delay, limits.first_delay), limits.last_delay)
        return self._delay

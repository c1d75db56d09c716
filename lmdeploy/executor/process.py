"""ProcessExecutor: several ranks of one machine. The first lives in the caller's thread, the others in processes.

Life: ``start`` makes the workers, waits until all have met, and loads on all of them at once; ``launch`` sends the plan
to every worker and runs it here; ``stop`` ends them. Every worker has a thread here that starts it, listens to it and
judges it: one that ends, fails or falls silent is the end of all, because the others wait for it in the middle of a
step. They are killed, the exchange under way here is broken off, and what the step raises then is replaced by the
cause. Nothing outlives the caller: workers die with the thread that started them, and what they met at is a file in a
folder of its own, gone when they have met.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import lmdeploy
from lmdeploy import errors
from lmdeploy.config.engine import EngineConfig
from lmdeploy.config.env import child_environment
from lmdeploy.config.model import ModelConfig
from lmdeploy.engine.plan import StepPlan, StepResult
from lmdeploy.errors import EngineDead, LmdeployError
from lmdeploy.executor.base import Capacity, StepHandle
from lmdeploy.executor.channel import Channel, ChannelError
from lmdeploy.executor.local import LocalExecutor
from lmdeploy.log import get_logger
from lmdeploy.parallel.distributed import connect, local_store
from lmdeploy.runner.host import divide_threads
from lmdeploy.runner.model_runner import choose_device
from lmdeploy.weights.checkpoint import Checkpoint

PROGRAM = (sys.executable, '-m', 'lmdeploy.executor.worker')
SILENT_SECONDS = 4.0  # a worker says twice a second that it lives
LOAD_SILENT_SECONDS = 120.0  # imports and compilers may hold the interpreter for long
HEARD_SECONDS = 1.5  # for the cause of a failure to arrive after its effect
CLOSE_SECONDS = 5.0
TAIL_LINES = 40
_LINE = re.compile(r'<(\d\d)>(.*)')
T = TypeVar('T')


class Worker:
    """One rank's process, from this side.

    Attributes:
        here, ready: it has come up; it has loaded.
        results: of calls.
    """

    def __init__(self, rank: int, failed: Callable[[int, LmdeployError], None]) -> None:
        self.rank = rank
        self.here, self.ready = threading.Event(), threading.Event()
        self.results: deque[str] = deque()
        self._failed = failed
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.settimeout(LOAD_SILENT_SECONDS)
        self.channel = Channel(ours)
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._process: subprocess.Popen[bytes] | None = None
        self._started, self.stopping = threading.Event(), False
        self._reader = threading.Thread(target=self._run, name=f'lmdeploy-rank-{rank}', daemon=True)
        self._reader.start()
        threading.Thread(target=self._listen, name=f'lmdeploy-rank-{rank}-alive', daemon=True).start()

    def _run(self) -> None:
        """Start the process and read its output until it ends; it is bound to the life of this thread."""
        command = [*PROGRAM, str(self._theirs.fileno()), str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=(self._theirs.fileno(),), start_new_session=True, env=child_environment(),
                cwd=Path(lmdeploy.__file__).parent.parent)
        except OSError as error:
            self._failed(self.rank, EngineDead('LMD-362', rank=self.rank, cause=f'it could not be started: {error}'))
        finally:
            self._theirs.close()
            self._started.set()
        if self._process is None:
            return
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in iter(lambda: output.readline(1 << 16), b''):
                found = _LINE.fullmatch(line.decode(errors='replace').rstrip())
                level, text = (int(found[1]), found[2]) if found else (logging.WARNING, repr(line)[2:-1])
                self._tail.append(text)
                get_logger().log(level, 'rank %d: %s', self.rank, text)
        self._process.wait()

    def _listen(self) -> None:
        """Take its messages until it ends; judge it by its silence."""
        while True:
            try:
                kind, *rest = self.channel.receive()
            except TimeoutError:
                cause = f'it has not been heard for {self.channel.sock.gettimeout():.0f} s'
                return self._give_up(EngineDead('LMD-362', rank=self.rank, cause=cause))
            except ChannelError:
                return self._give_up(EngineDead('LMD-362', rank=self.rank, cause=self._ending()))
            if kind == 'failed':
                return self._give_up(_error(self.rank, *rest))
            if kind == 'ready':
                self.channel.sock.settimeout(SILENT_SECONDS)
                self.ready.set()
            elif kind == 'here':
                self.here.set()
            elif kind == 'result':
                self.results.append(rest[0])

    def _give_up(self, error: LmdeployError) -> None:
        if not self.stopping:
            self._failed(self.rank, error)
        self.here.set()
        self.ready.set()

    def _ending(self) -> str:
        """How the process ended, and the last lines it wrote."""
        self._reader.join(HEARD_SECONDS)
        status = None if self._process is None else self._process.poll()
        how = 'it closed its channel' if status is None else (
            f'it was ended by signal {-status}' if status < 0 else f'it ended with status {status}')
        return '\n'.join((how, *list(self._tail)[-10:]))

    def kill(self) -> None:
        """End the process at once."""
        self.stopping = True
        self._started.wait()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def wait(self, seconds: float) -> bool:
        """Whether the process ends within ``seconds``."""
        self._reader.join(seconds)
        return not self._reader.is_alive()


class ProcessExecutor:
    """Implements :class:`~lmdeploy.executor.base.Executor` for ``engine_config.tp`` ranks.

    Args:
        engine_config, model_files_path, model_config, checkpoint: as :class:`LocalExecutor`.
    """

    def __init__(self, engine_config: EngineConfig, model_files_path: Path, *, model_config: ModelConfig | None = None,
                 checkpoint: Checkpoint | None = None) -> None:
        self._config, self._path = engine_config, model_files_path
        self._given = model_config, checkpoint
        self._workers: list[Worker] = []
        self._error: LmdeployError | None = None
        self._broken = threading.Event()
        self._local: LocalExecutor | None = None
        self._group: Any = None

    @property
    def local(self) -> LocalExecutor:
        """The first rank; after :meth:`start`."""
        assert self._local is not None
        return self._local

    @property
    def model_config(self) -> ModelConfig:
        """The model's shape; after :meth:`start`."""
        return self.local.model_config

    @property
    def generation_config(self) -> dict[str, Any]:
        """The checkpoint's generation_config.json, or ``{}``; after :meth:`start`."""
        return self.local.generation_config

    @property
    def dtype(self) -> Any:
        """Of weights and activations; after :meth:`start`."""
        return self.local.dtype

    def start(self) -> Capacity:
        """Load on all ranks.

        Raises:
            ConfigError, LoadError: as one rank alone does.
            EngineDead: LMD-362: a rank could not be started, or ended.
        """
        size = self._config.tp
        device = choose_device(self._config.device, 0, size)
        folder = Path(tempfile.mkdtemp(prefix='lmdeploy-'))
        try:
            self._workers = [Worker(rank, self._fail) for rank in range(1, size)]
            level = get_logger().getEffectiveLevel()
            for worker in self._workers:
                self._tell(worker, 'start', self._config, str(self._path.absolute()), worker.rank, size, str(folder),
                           level)  # fmt: skip
            divide_threads(size)
            self._await('here')
            for worker in self._workers:
                self._tell(worker, 'meet')
            self._group = self._guarded(lambda: connect(local_store(folder, size), 0, size, device))
            model_config, checkpoint = self._given
            self._local = LocalExecutor(self._config, self._path, model_config=model_config, checkpoint=checkpoint,
                                        group=self._group)  # fmt: skip
            capacity = self._guarded(self._local.start)
            self._await('ready')
        except BaseException:
            self.stop()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        capacity.choices['tp'] = str(size)
        return capacity

    def launch(self, plan: StepPlan) -> StepHandle:
        """Send a step to all ranks and start it here.

        Raises:
            EngineDead: LMD-362: a rank has failed.
        """
        self._check()
        for worker in self._workers:
            self._tell(worker, 'plan', plan)
        return _Handle(self._guarded(lambda: self.local.launch(plan)), self._guarded)

    def call(self, name: str, *args: Any) -> list[Any]:
        """Call a method of every rank's runner; results of other ranks come as text.

        Raises:
            EngineDead: LMD-362: a rank has failed.
        """
        self._check()
        for worker in self._workers:
            self._tell(worker, 'call', name, args)
        results = self._guarded(lambda: self.local.call(name, *args))
        for worker in self._workers:
            while not worker.results:
                self._check()
                time.sleep(0.001)
            results.append(worker.results.popleft())
        return results

    def stop(self) -> None:
        """End all ranks; safe to call twice."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.stopping = True
            if self._error is None and worker.ready.is_set():
                try:
                    worker.channel.send('stop')
                except ChannelError:
                    pass  # it has gone already
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in workers:
            if self._error is not None or not worker.ready.is_set() or not worker.wait(deadline - time.monotonic()):
                worker.kill()
                worker.wait(CLOSE_SECONDS)
            worker.channel.close()
        if self._local is not None:
            self._local.stop()
        if self._group is not None:
            self._group.transport.abort()
            self._group = None

    # -- failure -------------------------------------------------------------------------------------------------------

    def _fail(self, rank: int, error: LmdeployError) -> None:
        """In a worker's thread: one rank has failed, so all have."""
        if self._error is not None:
            return
        self._error = error
        get_logger().critical('rank %d failed: %s', rank, error)
        for worker in self._workers:
            worker.kill()
        if self._group is not None:
            self._group.transport.abort()
        self._broken.set()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _tell(self, worker: Worker, *message: Any) -> None:
        try:
            worker.channel.send(*message)
        except ChannelError:
            self._broken.wait(HEARD_SECONDS)
            self._check()
            raise EngineDead('LMD-362', rank=worker.rank, cause='it closed its channel') from None

    def _await(self, what: str) -> None:
        for worker in self._workers:
            getattr(worker, what).wait()
            self._check()

    def _guarded(self, work: Callable[[], T]) -> T:
        """``work()``; what it raises because of another rank is replaced by that rank's failure."""
        try:
            value = work()
        except LmdeployError:
            raise
        except Exception:
            if self._broken.wait(HEARD_SECONDS) and self._error is not None:
                raise self._error from None
            raise
        self._check()
        return value


class _Handle:
    """A launched step of which other ranks are part."""

    __slots__ = ('_guarded', '_inner')

    def __init__(self, inner: StepHandle, guarded: Callable[[Callable[[], StepResult]], StepResult]) -> None:
        self._inner, self._guarded = inner, guarded

    def result(self) -> StepResult:
        return self._guarded(self._inner.result)


def _error(rank: int, name: str, code: str, params: tuple[tuple[str, str], ...], trace: str) -> LmdeployError:
    """What a rank has sent as its last word."""
    cls = getattr(errors, name, None)
    if code and isinstance(cls, type) and issubclass(cls, LmdeployError):
        return cls(code, **dict(params))
    return EngineDead('LMD-362', rank=rank, cause=trace.strip())

"""A rank as a program: ``python -m lmdeploy.executor.worker FD PID``.

It is started by :class:`lmdeploy.executor.process.ProcessExecutor` with an end of a socket pair and the parent's
process id. The first message says what to load and where the ranks meet; then come plans, which run in order, and calls
between them. A worker says every half second that it lives; when it cannot go on it sends its traceback and ends, and
it ends without a word when its parent does.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import traceback
from collections import deque
from pathlib import Path
from typing import Any

from lmdeploy.child import log_to_parent, outlive_nothing
from lmdeploy.config.engine import EngineConfig
from lmdeploy.errors import LmdeployError
from lmdeploy.executor.channel import Channel, ChannelClosed
from lmdeploy.log import get_logger

ALIVE_SECONDS = 0.5
DEPTH = 4  # steps that may be under way before the first of them is awaited
EXIT_FAILED = 70  # EX_SOFTWARE


def serve(channel: Channel) -> None:
    """Load, run what comes, and return when told to stop.

    Raises:
        ChannelClosed: the parent has gone.
        Exception: whatever loading or a step raised.
    """
    _, config, path, rank, size, folder, level = channel.receive()
    get_logger().setLevel(level)
    stopped = threading.Event()
    threading.Thread(target=_beat, args=(channel, stopped), name='lmdeploy-alive', daemon=True).start()
    import torch

    from lmdeploy.executor.local import LocalExecutor
    from lmdeploy.parallel.distributed import connect, local_store
    from lmdeploy.runner.host import divide_threads
    from lmdeploy.runner.model_runner import choose_device

    assert isinstance(config, EngineConfig)
    device = choose_device(config.device, rank)
    divide_threads(size)
    channel.send('here')
    channel.receive()  # all are here
    group = connect(local_store(Path(folder), size), rank, size, device)
    executor = LocalExecutor(config, Path(path), group=group)
    executor.start()
    channel.send('ready')
    flying: deque[Any] = deque()
    while True:
        kind, *rest = channel.receive()
        if kind == 'plan':
            flying.append(executor.launch(rest[0]))
            while len(flying) > DEPTH:
                flying.popleft().result()
        elif kind == 'call':
            name, arguments = rest
            channel.send('result', repr(executor.call(name, *arguments)[0]))
        else:
            break
    stopped.set()
    executor.stop()
    if device.type != 'cpu':
        torch.cuda.synchronize()


def _beat(channel: Channel, stopped: threading.Event) -> None:
    while not stopped.wait(ALIVE_SECONDS):
        try:
            channel.send('alive')
        except ChannelClosed:
            os._exit(0)  # the parent has gone, whatever the other thread waits for


def main() -> None:
    """The program; never returns."""
    status = EXIT_FAILED
    try:
        outlive_nothing(int(sys.argv[-1]))
        log_to_parent()
        with socket.socket(fileno=int(sys.argv[-2])) as sock:
            sock.set_inheritable(False)
            channel = Channel(sock)
            try:
                serve(channel)
                status = 0
            except ChannelClosed:
                status = 0
            except BaseException as cause:
                _report(channel, cause)
                raise
    except BaseException:
        get_logger().critical('a rank failed', exc_info=True)
    finally:
        logging.shutdown()
        os._exit(status)


def _report(channel: Channel, cause: BaseException) -> None:
    code, params = (cause.code, json_params(cause)) if isinstance(cause, LmdeployError) else ('', ())
    try:
        channel.send('failed', type(cause).__name__, code, params, traceback.format_exc()[-8000:])
    except ChannelClosed:
        pass  # nobody is left to be told


def json_params(error: LmdeployError) -> tuple[tuple[str, str], ...]:
    """The parameters of an error as text."""
    return tuple((name, str(value)) for name, value in error.params.items())


if __name__ == '__main__':
    main()

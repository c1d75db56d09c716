"""A program that behaves as the engine's process, without a model: ``python -m tests.engine.fake_engine OPTIONS...``

Options: ``delay=SECONDS`` of each step, ``load=SECONDS|error|bug|crash``. Tokens of a prompt act when a step first sees
them: ``KILL``, ``HANG``, ``RAISE``, ``EXIT``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace

from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.fake import FakeExecutor
from lmdeploy.engine.process import Engine, main
from lmdeploy.engine.serving import plain_intake
from lmdeploy.errors import LoadError
from lmdeploy.executor.base import Capacity
from lmdeploy.log import get_logger

CAPACITY = Capacity(num_blocks=1000, block_size=8, max_batch_size=64, max_step_tokens=256, session_len=4000,
                    vocab_size=100, device='fake')
KILL, HANG, RAISE, EXIT = 90, 91, 92, 93


class DrillExecutor(FakeExecutor):
    """Fails on demand."""

    delay = 0.0

    def launch(self, plan):
        asked = {token for opened in plan.opened for token in opened.tokens[:opened.prompt_len].tolist()}
        if KILL in asked:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANG in asked:
            time.sleep(3600)
        if RAISE in asked:
            raise RuntimeError('a device error')
        if EXIT in asked:
            print('the last words', flush=True)
            os._exit(3)
        time.sleep(self.delay)
        return super().launch(plan)


def build(load, tell):
    """An engine of a fake executor."""
    options = dict(option.split('=') for option in sys.argv[1:-2])
    how = options.get('load', '0')
    tell('thinking')
    if how == 'error':
        raise LoadError('LMD-120', path=load.path, reason='it is a fake')
    if how == 'bug':
        raise KeyError('no such thing')
    if how == 'crash':
        sys.stderr.write('out of everything\n')
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(how))
    get_logger().warning('loaded %s', load.path)
    executor = DrillExecutor(CAPACITY)
    executor.delay = float(options.get('delay', '0'))
    capacity = replace(CAPACITY, choices={'session_len': str(load.config.session_len)})
    return Engine(EngineCore(executor, capacity, depth=2), 4000, plain_intake, executor.stop)


if __name__ == '__main__':
    main(build)

"""The engine as a program: ``python -m lmdeploy.engine.process FD PID``.

It is started by :class:`lmdeploy.engine.remote.ProcessClient` with an end of a socket pair and the parent's process id.
The first message says what to load; then the main thread steps the core and a second one reads requests. The engine
lives as long as the parent: signals that are meant for a whole group of processes are left to the parent, whose death
or closed socket ends it. This is one of the two places that put an engine together (the other is ``lmdeploy.api``).
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmdeploy.child import log_to_parent, outlive_nothing
from lmdeploy.config.encoder import is_encoder
from lmdeploy.engine import wire
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.faults import fatal
from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.serving import MakeRequest, plain_intake, serve
from lmdeploy.errors import LmdeployError
from lmdeploy.log import get_logger

if TYPE_CHECKING:
    from lmdeploy.tokenizer import Tokenizer

LINGER_SECONDS = 10.0  # for a step that runs when the parent has gone
EXIT_FAILED, EXIT_PROTOCOL = 70, 76  # EX_SOFTWARE, EX_PROTOCOL


@dataclass(slots=True)
class Engine:
    """A loaded engine.

    Attributes:
        context_len: the context length that the model was made for.
        intake: makes a request of its message; may take seconds.
        stop: releases the device.
    """

    core: EngineCore
    context_len: int
    intake: MakeRequest
    stop: Callable[[], None]


class Intake:
    """Makes requests of their messages: bad words and grammars are built with this process's tokenizer.

    Args:
        tokenizer: the model's, perhaps still loading.
        vocab_size: rows of the model's logits.
    """

    def __init__(self, tokenizer: Future[Tokenizer], vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiler: Any = None

    def __call__(self, message: wire.Submit, pixels: list[np.ndarray]) -> EngineInput:
        """The request.

        Raises:
            LmdeployError: its grammar cannot be compiled, or the model has no tokenizer for it.
        """
        request = message.request(pixels)
        if message.bad_words:
            from lmdeploy.frontend.bad_words import BadWords

            bans = tuple(BadWords(words, self._tokenizer.result(), at) for words, at in message.bad_words)
            request.params = replace(request.params, logits_processors=bans)
        if message.grammar is not None:
            request.grammar = self._grammar(message.grammar, request.params.stop_ids)
        return request

    def _grammar(self, spec: wire.GrammarSpec, stop_ids: tuple[int, ...]) -> Any:
        from lmdeploy.grammar.compiler import Compiler
        from lmdeploy.grammar.formats import Source

        if self._compiler is None:
            self._compiler = Compiler(self._tokenizer.result(), self._vocab_size)  # the server has a sandbox
        return self._compiler.compile(Source(spec.kind, spec.text)).matcher(stop_ids)  # type: ignore[arg-type]


def load_engine(load: wire.Load, tell: Callable[[str], None]) -> Engine:
    """Build the engine that ``load`` asks for; ``tell`` gets what it is busy with.

    Raises:
        ConfigError, LoadError, TemplateError: as :func:`lmdeploy.pipeline` does.
    """
    tell('importing torch')
    path = Path(load.path)
    if is_encoder(path):
        return _load_encoder(load, path, tell)
    from lmdeploy.executor.choice import make_executor

    executor = make_executor(load.config, path)
    tell('loading the model')
    tokenizer = _load_tokenizer(path)
    capacity = executor.start()
    core = EngineCore(executor, capacity, depth=load.config.depth_on(capacity.device),
                      prefix_caching=load.config.prefix_caching)
    return Engine(core, executor.model_config.context_len, Intake(tokenizer, capacity.vocab_size), executor.stop)


def _load_encoder(load: wire.Load, path: Path, tell: Callable[[str], None]) -> Engine:
    from lmdeploy.executor.encoder import EncoderExecutor

    executor = EncoderExecutor(load.config, path)
    tell('loading the model')
    capacity = executor.start()
    core = EngineCore(executor, capacity, depth=load.config.depth_on(capacity.device))
    return Engine(core, executor.context_len, plain_intake, executor.stop)


def _load_tokenizer(path: Path) -> Future[Tokenizer]:
    """Beside the weights; a model without one serves all requests that need none."""
    from lmdeploy.tokenizer import Tokenizer

    future: Future[Tokenizer] = Future()

    def load() -> None:
        try:
            future.set_result(Tokenizer(str(path)))
        except Exception as error:  # raised again by who asks for the result
            future.set_exception(error)

    threading.Thread(target=load, name='lmdeploy-tokenizer', daemon=True).start()
    return future


def _watch(sock: socket.socket, loaded: threading.Event) -> None:
    """End the process if the parent goes while the model loads; nothing needs to be put right then."""
    try:
        gone = not sock.recv(1, socket.MSG_PEEK)
    except ConnectionError:
        gone = True
    if gone and not loaded.is_set():
        os._exit(0)


def _leave_soon() -> None:
    timer = threading.Timer(LINGER_SECONDS, os._exit, (EXIT_FAILED,))
    timer.daemon = True
    timer.start()


def run(sock: socket.socket, build: Callable[[wire.Load, Callable[[str], None]], Engine]) -> int:
    """Load, serve until the parent closes its end, and return the exit status.

    Args:
        build: as :func:`load_engine`.
    """
    frames = wire.Frames()
    payloads = wire.receive(sock, frames)
    load = wire.to_engine(next(payloads, b''))
    if not isinstance(load, wire.Load):
        raise wire.WireError('the first message is not what to load')
    get_logger().setLevel(load.log_level)
    loaded = threading.Event()
    threading.Thread(target=_watch, args=(sock, loaded), daemon=True).start()
    try:
        engine = build(load, lambda text: sock.sendall(wire.encode(wire.Stage(text))))
    except Exception as cause:  # whatever it is, the parent tells it
        if not isinstance(cause, LmdeployError):
            get_logger().critical('the engine cannot start', exc_info=cause)
        error = cause if isinstance(cause, LmdeployError) else fatal(cause)
        sock.sendall(wire.encode(wire.Failed(wire.Error.of(error))))
        return EXIT_FAILED
    loaded.set()
    core = engine.core
    gc.collect()
    gc.freeze()  # nothing that is there now goes before the process does: collections need not look at it
    sock.sendall(wire.encode(wire.Ready(core.scheduler.capacity, engine.context_len,
                                        list(wire.stats_values(core.stats())))))
    alive = serve(core, sock, engine.intake, on_end=_leave_soon)
    engine.stop()
    return 0 if alive else EXIT_FAILED


def main(build: Callable[[wire.Load, Callable[[str], None]], Engine] = load_engine) -> None:
    """The program; never returns. The interpreter's own tear-down is left out: there is nothing it could save."""
    status = EXIT_FAILED
    try:
        outlive_nothing(int(sys.argv[-1]))
        log_to_parent()
        with socket.socket(fileno=int(sys.argv[-2])) as sock:
            sock.set_inheritable(False)
            status = run(sock, build)
    except wire.WireError as error:
        get_logger().critical('the parent sent %s', error)
        status = EXIT_PROTOCOL
    except BrokenPipeError:  # the parent has gone
        status = 0
    except BaseException:
        get_logger().critical('the engine process failed', exc_info=True)
    finally:
        logging.shutdown()
        os._exit(status)


if __name__ == '__main__':
    main()

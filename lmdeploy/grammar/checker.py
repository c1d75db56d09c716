"""Checker: grammars for an engine in another process, which compiles them itself.

Here they are only tried out, in the sandbox and over single bytes, in a few milliseconds: a second set of automata
over the model's vocabulary would take up to a second and about 54 MB, for nothing. What only the vocabulary shows (a
limit of a step that is exceeded with longer tokens) the engine's process finds before the first token, with the same
error.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from lmdeploy.errors import RequestError
from lmdeploy.grammar.automata import load
from lmdeploy.grammar.compiler import WORKERS
from lmdeploy.grammar.formats import Source
from lmdeploy.grammar.sandbox import Sandbox

CACHE_CHARACTERS = 4 << 20  # of sources that were found good


@dataclass(frozen=True, slots=True)
class Named:
    """Stands for the matcher that the engine's process makes of ``source``; it is never asked for anything here."""

    source: Source

    def fill(self, mask: np.ndarray) -> NoReturn:
        raise AssertionError('a grammar of another process')

    def accept(self, token: int) -> NoReturn:
        raise AssertionError('a grammar of another process')


@dataclass(frozen=True, slots=True)
class Checked:
    """A grammar that can be compiled."""

    source: Source

    def matcher(self, stop_ids: Sequence[int]) -> Named:
        """For one answer that ends with one of ``stop_ids``.

        Raises:
            RequestError: LMD-328, there is none.
        """
        if not stop_ids:
            raise RequestError('LMD-328')
        return Named(self.source)


class Checker:
    """Takes the place of a :class:`lmdeploy.grammar.compiler.Compiler`. Thread-safe."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._good: OrderedDict[Source, None] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix='lmdeploy-grammar')  # no thread before it has work

    async def prepare(self, source: Source) -> Checked:
        """Try a grammar out, outside the event loop.

        Raises:
            RequestError: LMD-325 (it cannot be used), LMD-326 (too complex), LMD-327 (the package is missing).
        """
        load()
        with self._lock:
            known = source in self._good
            if known:
                self._good.move_to_end(source)
        if not known:
            await asyncio.get_running_loop().run_in_executor(self._pool, self._sandbox.check, source)
            self._keep(source)
        return Checked(source)

    def close(self) -> None:
        """End the sandbox's processes and the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._sandbox.close()

    def _keep(self, source: Source) -> None:
        with self._lock:
            if source in self._good:
                return
            self._good[source] = None
            self._held += len(source.text)
            while self._held > CACHE_CHARACTERS:
                self._held -= len(self._good.popitem(last=False)[0].text)

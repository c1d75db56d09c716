"""Compiler: from a checked source to matchers for one model's vocabulary, with a cache."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lmdeploy.errors import RequestError
from lmdeploy.grammar.automata import build, load
from lmdeploy.grammar.formats import Source
from lmdeploy.grammar.matcher import Matcher
from lmdeploy.grammar.sandbox import Sandbox
from lmdeploy.grammar.vocabulary import TokenBytes, build_vocabulary

if TYPE_CHECKING:
    from lmdeploy.tokenizer import Tokenizer

CACHE_BYTES = 64 << 20
WORKERS = 2  # compilations at once
BASE_BYTES, BYTES_PER_CHARACTER = 64 << 10, 128  # of a compiled grammar, measured


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar ready for use: every answer gets a matcher of its own, in microseconds."""

    source: Source
    automaton: Any  # an LLMatcher at the start, copied and never moved
    end_id: int
    first_ban: np.ndarray | None

    def matcher(self, stop_ids: Sequence[int]) -> Matcher:
        """A matcher for one answer that ends with one of ``stop_ids``.

        Raises:
            RequestError: LMD-328, there is none.
        """
        if not stop_ids:
            raise RequestError('LMD-328')
        return Matcher(self.source, self.automaton.deep_copy(), end_id=self.end_id, stop_ids=tuple(stop_ids),
                       first_ban=self.first_ban)

    @property
    def nbytes(self) -> int:
        """About how much memory it holds."""
        return BASE_BYTES + BYTES_PER_CHARACTER * len(self.source.text)


class Compiler:
    """Compiles grammars for one tokenizer. Thread-safe, and usable from several event loops.

    Nothing is loaded or built before the first grammar; that one takes a second longer, while the vocabulary is read.

    Args:
        tokenizer: the model's.
        vocab_size: rows of the model's logits, which the masks cover.
        sandbox: where grammars are tried out; None: they come checked, from a process that did so.
        cache_bytes: compiled grammars are kept up to this much, the least recently used go first.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, sandbox: Sandbox | None = None,
                 cache_bytes: int = CACHE_BYTES) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._sandbox = sandbox
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[Source, Compiled] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()  # of cache, pool and vocabulary
        self._building = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._vocabulary: tuple[Any, TokenBytes, np.ndarray | None] | None = None

    async def prepare(self, source: Source) -> Compiled:
        """:meth:`compile`, outside the event loop.

        Raises:
            RequestError: LMD-325 to LMD-328.
        """
        load()
        found = self._find(source)
        if found is not None:
            return found
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix='lmdeploy-grammar')
            pool = self._pool
        return await asyncio.get_running_loop().run_in_executor(pool, self.compile, source)

    def compile(self, source: Source) -> Compiled:
        """The grammar, from the cache if it is there.

        Raises:
            RequestError: LMD-325 (it cannot be used), LMD-326 (too complex), LMD-327 (the package is missing), LMD-328
                (the model has no end token).
        """
        found = self._find(source)
        if found is not None:
            return found
        if self._sandbox is not None:
            self._sandbox.check(source)
        vocabulary, tokens, first_ban = self._read_vocabulary()
        compiled = Compiled(source, build(vocabulary, source.kind, source.text), tokens.eos_token_id, first_ban)
        self._keep(compiled)
        return compiled

    def close(self) -> None:
        """End the sandbox's processes and the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._sandbox is not None:
            self._sandbox.close()

    def _find(self, source: Source) -> Compiled | None:
        with self._lock:
            found = self._cache.get(source)
            if found is not None:
                self._cache.move_to_end(source)
            return found

    def _keep(self, compiled: Compiled) -> None:
        with self._lock:
            if compiled.source in self._cache:
                return
            self._cache[compiled.source] = compiled
            self._held += compiled.nbytes
            while self._held > self._cache_bytes and len(self._cache) > 1:
                _, dropped = self._cache.popitem(last=False)
                self._held -= dropped.nbytes

    def _read_vocabulary(self) -> tuple[Any, TokenBytes, np.ndarray | None]:
        with self._building:
            if self._vocabulary is None:
                tokens = TokenBytes(self._tokenizer, self._vocab_size)
                first_ban = None
                if self._tokenizer.vocabulary.spelling.strip:
                    # such a tokenizer drops the first space of a text, so that the text would not be what was matched
                    bits = np.array([token.startswith(b' ') for token in tokens.tokens], np.uint8)
                    bits = np.pad(bits, (0, -len(bits) % 32))
                    first_ban = np.packbits(bits, bitorder='little').view('<u4').astype(np.uint32)
                self._vocabulary = build_vocabulary(tokens), tokens, first_ban
            return self._vocabulary

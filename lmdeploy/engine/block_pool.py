"""BlockPool: who holds which KV block, and which blocks can be found again by their content.

A block is free (holds nothing), used (one or more requests have it in their tables) or cached (nobody uses it, but its
content is in the prefix index; it is evicted, least recently used first, when free blocks run out).

free --allocate--> used --publish--> used and indexed --release--> cached --match--> used
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

_SECRET = secrets.token_bytes(32)  # keys cannot be predicted from outside, nor carried from process to process


def root_key(*parts: bytes) -> bytes:
    """The parent of a first block: a digest of who may share it (salt, tenant, adapter)."""
    digest = hashlib.blake2b(digest_size=16, key=_SECRET, person=b'root')
    for part in parts:
        digest.update(len(part).to_bytes(8, 'big'))
        digest.update(part)
    return digest.digest()


def block_key(parent: bytes, tokens: bytes, media: bytes = b'') -> bytes:
    """The key of a full block: a digest of all tokens up to its end, through the parent's key.

    Args:
        parent: key of the block before it, or the root key.
        tokens: the block's token ids, int32.
        media: what the image placeholders among them stand for.
    """
    return hashlib.blake2b(parent + tokens + media, digest_size=16, key=_SECRET).digest()


class BlockPool:
    """Hands out blocks ``1 .. num_blocks`` and counts who holds them (block 0 is the null block).

    Invariants:
        1. free, cached and used blocks are disjoint and are all blocks.
        2. a block's reference count is the number of tables it is in.
        3. key -> block and block -> key are inverse; a free block has no key, a cached one has.

    Args:
        num_blocks: usable blocks.
        debug: keep the token ids of indexed blocks and compare them on a hit.
    """

    def __init__(self, num_blocks: int, *, debug: bool = False) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._refs = [0] * (num_blocks + 1)
        self._index: dict[bytes, int] = {}
        self._keys: list[bytes | None] = [None] * (num_blocks + 1)
        self._tokens: dict[int, tuple[int, ...]] | None = {} if debug else None

    @property
    def debug(self) -> bool:
        """Whether hits compare token ids."""
        return self._tokens is not None

    @property
    def available(self) -> int:
        """Blocks that :meth:`allocate` can give."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Unused blocks that keep their content."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Blocks in tables."""
        return self.num_blocks - len(self._free) - len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks with one reference each; the caller has seen that they are :attr:`available`."""
        free, refs = self._free, self._refs
        blocks = []
        for _ in range(count):
            if free:
                block = free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._unindex(block)
            refs[block] = 1
            blocks.append(block)
        return blocks

    def match(self, keys: Iterable[bytes], tokens: Sequence[int] = (), block_size: int = 0) -> list[int]:
        """The longest run of indexed blocks from the first of ``keys`` on, each with one reference more.

        ``tokens`` and ``block_size`` are compared in debug mode only. Undo with :meth:`release`.
        """
        blocks: list[int] = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            if self._tokens is not None:
                at = len(blocks) * block_size
                assert self._tokens[block] == tuple(tokens[at:at + block_size]), 'a digest matches other tokens'
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes, tokens: Sequence[int] = ()) -> bool:
        """Put a used block, final in content, into the index; False if a block of that content is there already."""
        assert self._refs[block] > 0, f'block {block} is published but not in use'
        if key in self._index:
            return self._index[key] == block
        assert self._keys[block] is None, f'block {block} is published under two keys'
        self._index[key] = block
        self._keys[block] = key
        if self._tokens is not None:
            self._tokens[block] = tuple(tokens)
        return True

    def withdraw(self, block: int) -> None:
        """Take a block out of the index (its content is not to be trusted, or nobody may find it any more)."""
        self._unindex(block)
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Withdraw the blocks that are indexed under ``keys``."""
        for key in keys:
            if key in self._index:
                self.withdraw(self._index[key])

    def key(self, block: int) -> bytes | None:
        """The key under which ``block`` is indexed."""
        return self._keys[block]

    def indexed(self) -> Iterable[tuple[int, tuple[int, ...]]]:
        """Blocks in the index with their token ids; in debug mode only."""
        assert self._tokens is not None
        return self._tokens.items()

    def __len__(self) -> int:
        return len(self._index)

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each block. Later blocks of a table are evicted before earlier ones."""
        refs = self._refs
        for block in reversed(blocks):
            assert refs[block] > 0, f'block {block} is released but not in use'
            refs[block] -= 1
            if refs[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert the invariants, given all tables that exist."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, refs in enumerate(self._refs) if refs}
        assert len(free) == len(self._free), '1: a block is free twice'
        assert not (free & cached or free & used or cached & used), '1: a block is in two states'
        assert free | cached | used == set(range(1, self.num_blocks + 1)), '1: a block is lost, or block 0 is in use'
        held = Counter(block for table in tables for block in table)
        assert held == Counter({block: self._refs[block] for block in used}), '2: references and tables differ'
        keys = {key: block for block, key in enumerate(self._keys) if key is not None}
        assert keys == self._index, '3: index and keys differ'
        assert not any(self._keys[block] for block in free), '3: a free block has a key'
        assert all(self._keys[block] for block in cached), '3: a cached block has no key'

    def _unindex(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            self._keys[block] = None
            del self._index[key]
            if self._tokens is not None:
                del self._tokens[block]

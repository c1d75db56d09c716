"""From an EngineInput to a Request: what is refused, and what is decided once for all its steps."""

from __future__ import annotations

from collections.abc import Container

from lmdeploy.engine.block_pool import root_key
from lmdeploy.engine.request import NEVER, EngineInput, ImageSpan, Request
from lmdeploy.errors import RequestError
from lmdeploy.executor.base import Capacity


def longest(capacity: Capacity) -> int:
    """The most tokens of a request: it may fill the pool alone, and its last token's KV is never computed."""
    return min(capacity.session_len, capacity.num_blocks * capacity.block_size + 1)


def refuse(given: EngineInput, capacity: Capacity, taken: Container[str]) -> None:
    """Refuse what could not run even alone; ``taken`` are the ids in use.

    Raises:
        RequestError: LMD-330 (length), LMD-331 (token id), LMD-332 (blocks), LMD-333 (id), LMD-676 and LMD-677
            (pictures).
    """
    length = len(given.tokens)
    if given.id in taken:
        raise RequestError('LMD-333', id=given.id)
    if not 1 <= length < capacity.session_len:
        raise RequestError('LMD-330', prompt_len=length, most=capacity.session_len - 1)
    needed = -(-length // capacity.block_size)
    if needed > capacity.num_blocks:
        raise RequestError('LMD-332', prompt_len=length, needed=needed, num_blocks=capacity.num_blocks)
    low, high = min(given.tokens), max(given.tokens)
    if low < 0 or high >= capacity.vocab_size:
        raise RequestError('LMD-331', token=low if low < 0 else high, vocab_size=capacity.vocab_size)
    _refuse_images(given.images, length, capacity)


def _refuse_images(images: tuple[ImageSpan, ...], length: int, capacity: Capacity) -> None:
    end, room = 0, capacity.pictures
    for index, span in enumerate(images):
        tokens = span.end - span.start
        if (room is None or not end <= span.start < span.end <= length or tokens != span.layout.tokens
                or span.pixels.ndim != 4 or len(span.pixels) != span.layout.tiles or span.layout.tiles < 1):
            raise RequestError('LMD-677', index=index, tokens=tokens)
        if tokens > room.tokens:
            raise RequestError('LMD-676', tokens=tokens, most=room.tokens)
        end = span.end


def receive(given: EngineInput, seq: int, capacity: Capacity, *, prefix_caching: bool, drafts: bool) -> Request:
    """The host's view of a new request.

    Args:
        seq: its place in the order of arrival.
        drafts: whether draft tokens are proposed for it.
    """
    length, params = len(given.tokens), given.params
    request = Request(
        id=given.id, seq=seq, tokens=list(given.tokens), prompt_len=length, params=params,
        limit=min(length + params.max_new_tokens, longest(capacity)), tenant=given.tenant, priority=given.priority,
        images=given.images, images_end=given.images[-1].end if given.images else 0,
        grammar=given.grammar, stop_ids=frozenset(params.stop_ids),
        serial=given.grammar is not None or params.needs_host or drafts,
        all_rows='all' in (params.output_logits, params.output_hidden),
        outputs=bool(params.output_logits or params.output_hidden or params.logprobs >= 0))
    request.plain = not (request.serial or request.all_rows)
    request.usual = request.plain and not request.outputs
    if prefix_caching:
        request.root = root_key(given.salt, given.tenant.encode(), given.adapter.encode())
        request.publish_limit = NEVER
    return request

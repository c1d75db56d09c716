"""Pictures: whose embeddings the device holds, and which tiles are encoded next.

A picture is known by its digest. Before its tokens can be computed, all its tiles have to be encoded; a step encodes
tiles of several pictures at once, within a budget.

absent --hold--> held, encoding --(all tiles listed)--> held, whole --release--> kept --evict--> absent

A picture that is released before all its tiles are listed is forgotten at once. Kept ones are evicted, least recently
used first, when others need their room.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from lmdeploy.engine.plan import Encode, PictureRoom
from lmdeploy.engine.request import ImageSpan, Request


@dataclass(slots=True)
class Picture:
    """One picture on the device."""

    tokens: int
    tiles: int
    listed: int = 0  # tiles that a launched step encodes
    holders: int = 0
    lost: bool = False  # the device had no memory to encode it

    @property
    def whole(self) -> bool:
        return self.listed == self.tiles


class Pictures:
    """The bookkeeping of one device's pictures; the device does as the plans say.

    Invariants:
        1. the tokens of all pictures fit the room.
        2. a picture's holders are the requests whose next ``held`` images have it, and the rows of the latest step.
        3. kept pictures are those without holders, and are whole.
    """

    def __init__(self, room: PictureRoom | None) -> None:
        self.room = room or PictureRoom(0, 0, 0)
        self.pictures: dict[bytes, Picture] = {}
        self.tokens = 0
        self._kept: OrderedDict[bytes, None] = OrderedDict()  # least recently used first
        self._credit = 0.0  # patches that running texts still allow
        self._dear = 0.0  # the cost of a tile for which the last turn had no budget: turns save up for it
        self._encode: list[Encode] = []
        self._forget: list[bytes] = []
        self._read: list[bytes] = []  # by rows of the latest step, before which nothing of it may be forgotten
        self._budget, self._seen = 0.0, set[bytes]()
        self.full = False  # somebody got no room in this turn: nobody behind gets any

    # -- planning a step -----------------------------------------------------------------------------------------

    def begin(self, *, texts: bool) -> None:
        """A new turn. ``texts``: answers are being written, whose pace counts."""
        room = self.room
        self._credit = min(self._credit + room.patches, max(room.patches, self._dear)) if texts else 0.0
        self._budget = self._credit if texts else room.patches_alone
        self._texts, self._begun, self._dear = texts, False, 0.0
        self._seen.clear()
        self.full = False
        read, self._read = self._read, []
        for digest in read:
            self._release(digest)

    def reach(self, request: Request, stop: int) -> int:
        """How far the request's next row may go, ``stop`` at most: up to the first image that is not encoded.

        Takes places for the images before ``stop`` and lists their tiles, as far as room and budget allow.
        """
        for index in range(request.image_at, len(request.images)):
            span = request.images[index]
            if span.start >= stop:
                break
            if index >= request.image_at + request.held and not self._hold(request, span):
                return min(stop, max(span.start, request.computed))
            picture = self.pictures[span.digest]
            self._list(picture, span)
            if not picture.whole:
                stop = min(stop, max(span.start, request.computed))
        return stop

    def admits(self, request: Request, start: int, stop: int) -> bool:
        """Whether a request that begins to compute at ``start`` finds room for its first image before ``stop``."""
        span = next((span for span in request.images if span.end > start), None)
        if span is None or span.start >= stop or span.digest in self.pictures:
            return True
        return not self.full and span.layout.tokens <= self.room.tokens - self.tokens + self._spare()

    def _hold(self, request: Request, span: ImageSpan) -> bool:
        picture = self.pictures.get(span.digest)
        if picture is None:
            tokens = span.layout.tokens
            if self.full or tokens > self.room.tokens - self.tokens + self._spare():
                self.full = True
                return False
            while tokens > self.room.tokens - self.tokens:
                self._drop(next(iter(self._kept)))
            picture = self.pictures[span.digest] = Picture(tokens, span.layout.tiles)
            self.tokens += tokens
        elif picture.lost:
            return False
        elif not picture.holders:
            del self._kept[span.digest]
        picture.holders += 1
        request.held += 1
        return True

    def _list(self, picture: Picture, span: ImageSpan) -> None:
        """List tiles of a picture, as many as the budget allows; one at least where nothing else is listed and no
        text has to wait for it."""
        most = self.room.pictures
        if picture.whole or (most is not None and len(self._seen) >= most and span.digest not in self._seen):
            return
        cost = max(1.0, span.layout.patches / span.layout.tiles)
        count = min(picture.tiles - picture.listed, int(self._budget // cost))
        if not count and not self._begun and not self._texts:
            count = 1  # a single tile that is more than any budget
        if not count:
            self._dear = max(self._dear, cost)
            return
        first = picture.listed
        picture.listed += count
        self._begun = True
        self._seen.add(span.digest)
        self._budget -= count * cost
        if self._texts:
            self._credit -= count * cost
        self._encode.append(Encode(span.digest, first, span.pixels[first:first + count], span.layout))

    def take(self, launched: bool) -> tuple[tuple[Encode, ...], tuple[bytes, ...]]:
        """What the step encodes, and what it forgets before; ``launched``: it is, whether it encodes or not."""
        if not launched and not self._encode:
            return (), ()
        encode, forget = tuple(self._encode), tuple(self._forget)
        self._encode, self._forget = [], []
        return encode, forget

    # -- what requests do ----------------------------------------------------------------------------------------

    def enter(self, request: Request) -> None:
        """A request begins to compute at ``request.computed``."""
        images = request.images
        request.image_at = next((i for i, span in enumerate(images) if span.end > request.computed), len(images))

    def passed(self, request: Request) -> None:
        """The request computes up to ``request.computed``: images before that are not needed any more."""
        images = request.images
        while request.image_at < len(images) and images[request.image_at].end <= request.computed:
            self._read.append(images[request.image_at].digest)
            request.image_at += 1
            request.held -= 1

    def leave(self, request: Request) -> None:
        """The request computes nothing more."""
        for span in request.images[request.image_at:request.image_at + request.held]:
            self._release(span.digest)
        request.image_at = request.held = 0

    def lose(self, digests: Iterable[bytes]) -> None:
        """Pictures could not be encoded: whoever holds them ends, and they are forgotten."""
        for digest in set(digests).intersection(self.pictures):
            self.pictures[digest].lost = True
            if digest in self._kept:
                self._drop(digest)

    def has_lost(self, request: Request) -> bool:
        """Whether the request holds a picture that could not be encoded."""
        return any(self.pictures[span.digest].lost
                   for span in request.images[request.image_at:request.image_at + request.held])

    def _release(self, digest: bytes) -> None:
        picture = self.pictures[digest]
        picture.holders -= 1
        if picture.holders:
            return
        self._kept[digest] = None
        if not picture.whole or picture.lost:
            self._drop(digest)

    def _drop(self, digest: bytes) -> None:
        del self._kept[digest]
        picture = self.pictures.pop(digest)
        self.tokens -= picture.tokens
        self._encode = [encode for encode in self._encode if encode.picture != digest]
        if picture.listed:
            self._forget.append(digest)

    def _spare(self) -> int:
        return sum(self.pictures[digest].tokens for digest in self._kept)

    def check(self, requests: Iterable[Request]) -> None:
        """Assert the invariants, given all requests that hold a slot."""
        assert self.tokens == sum(p.tokens for p in self.pictures.values()), '1: tokens are miscounted'
        assert self.tokens <= self.room.tokens, '1: more pictures than there is room for'
        holders = dict(Counter(self._read))
        for request in requests:
            assert request.held >= 0, '2: fewer than no image is held'
            for span in request.images[request.image_at:request.image_at + request.held]:
                holders[span.digest] = holders.get(span.digest, 0) + 1
        assert all(p.holders == holders.pop(d, 0) for d, p in self.pictures.items()), '2: holders are miscounted'
        assert not holders, '2: a held picture is not there'
        kept = {digest for digest, picture in self.pictures.items() if not picture.holders}
        assert kept == set(self._kept), '3: kept pictures and those without holders differ'
        good = [self.pictures[digest].whole and not self.pictures[digest].lost for digest in kept]
        assert all(good), '3: a part of a picture is kept'

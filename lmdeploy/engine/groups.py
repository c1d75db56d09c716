"""Groups: requests that share one prompt, such as the n answers to one question.

The first to come is the leader; the others are parked until its prompt is computed and published, and then find its
blocks in the prefix index. If the leader ends before that, the next one leads. Without a prefix cache the group's
blocks have keys of its own and leave the index with its last member.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmdeploy.engine.block_pool import root_key

if TYPE_CHECKING:
    from lmdeploy.engine.request import Request


@dataclass(slots=True, eq=False)
class Group:
    """The unfinished members of one group."""

    name: str
    root: bytes | None = None  # parent key of the members' first blocks, where there is no prefix cache
    leader: Request | None = None
    ready: bool = False  # the prompt's blocks were published
    parked: list[Request] = field(default_factory=list)
    members: int = 0
    keys: set[bytes] = field(default_factory=set)  # published under the root

    def join(self, request: Request) -> bool:
        """Count a new member in; True if it has to wait for the leader."""
        self.members += 1
        if self.ready:
            return False
        if self.leader is None:
            self.leader = request
            return False
        self.parked.append(request)
        return True

    def wake(self) -> list[Request]:
        """The leader's prompt is published: the members that may go on."""
        self.ready, self.leader = True, None
        woken, self.parked = self.parked, []
        return woken

    def leave(self, request: Request) -> list[Request]:
        """A member ended: the members that may go on because of it."""
        self.members -= 1
        if request in self.parked:
            self.parked.remove(request)
        if request is not self.leader:
            return []
        self.leader = self.parked.pop(0) if self.parked else None
        return [self.leader] if self.leader is not None else []


class Groups:
    """All groups that have members."""

    def __init__(self, *, private: bool) -> None:
        self.private = private
        self._groups: dict[str, Group] = {}

    def get(self, name: str) -> Group:
        """The group of that name, new if it has no members yet."""
        group = self._groups.get(name)
        if group is None:
            root = root_key(b'group', secrets.token_bytes(16)) if self.private else None
            group = self._groups[name] = Group(name, root)
        return group

    def drop(self, group: Group) -> None:
        """The group has no members left."""
        del self._groups[group.name]

    def __iter__(self):
        return iter(self._groups.values())

    def __len__(self) -> int:
        return len(self._groups)

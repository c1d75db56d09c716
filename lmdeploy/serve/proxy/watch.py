"""Heartbeats: every node is asked for its health, each at its own pace, so that one that hangs holds up no other."""

from __future__ import annotations

import asyncio
import time

import httpx

from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.proxy.links import Links, starved
from lmdeploy.serve.proxy.nodes import Node, NodeTable

TICK_SECONDS = 0.25
DOWN_SECONDS = 2.0  # between the probes of a node that is down


class Watch:
    """Probes the nodes of a table.

    Args:
        seconds: between two probes of a node that is up.
    """

    def __init__(self, nodes: NodeTable, links: Links, seconds: float) -> None:
        self._nodes, self._links, self._seconds = nodes, links, seconds
        self._due: dict[Node, float] = {}
        self._probes: dict[Node, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Probe until it is cancelled."""
        try:
            while True:
                self.tick(time.monotonic())
                await asyncio.sleep(TICK_SECONDS)
        finally:
            for task in self._probes.values():
                task.cancel()

    def tick(self, now: float) -> None:
        """Begin the probes that are due."""
        self._nodes.forget()
        nodes = set(self._nodes)
        self._due = {node: due for node, due in self._due.items() if node in nodes}
        for node in nodes:
            due = self._due.setdefault(node, now + self._seconds)  # it has just registered
            if not node.up:
                due = min(due, node.probe_at)
            if now >= due and node not in self._probes:
                task = self._probes[node] = asyncio.get_running_loop().create_task(self._probe(node))
                task.add_done_callback(lambda _, node=node: self._probes.pop(node, None))  # type: ignore[misc]

    async def _probe(self, node: Node) -> None:
        try:
            status, _ = await self._links.ask(node, 'GET', '/health')
        except HttpError as error:
            if starved(error):
                return
            node.fail(str(error.params['reason']), certain=isinstance(error.__cause__, httpx.ConnectError))
        else:
            if status == 200:
                node.answered()
            elif node.up:
                node.down(f'its /health says {status}')
        finally:
            self._due[node] = time.monotonic() + self._seconds
            node.probe_at = time.monotonic() + DOWN_SECONDS

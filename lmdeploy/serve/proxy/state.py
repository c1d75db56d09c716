"""The nodes on disk, so that a proxy that starts again knows them at once.

Nodes that gave the proxy a key of their own are not written: no key ever is, and such nodes register again by
themselves.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import msgspec

from lmdeploy.config import env
from lmdeploy.errors import ConfigError
from lmdeploy.log import get_logger
from lmdeploy.serve.proxy.nodes import Node

DELAY_SECONDS = 0.5
MAX_BYTES = 4 << 20


class Saved(msgspec.Struct, frozen=True):
    """A node as it is written."""

    url: str
    models: tuple[str, ...]
    speed: float | None = None


class StateFile:
    """Keeps a file up to date. Changes that come together are written once.

    Args:
        path: made, with its folder, when there is something to write; readable by its owner only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._timer: asyncio.TimerHandle | None = None

    def read(self) -> list[Saved]:
        """What was written last; nothing, if nothing was.

        Raises:
            ConfigError: LMD-571, the file cannot be read, or holds something else.
        """
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise ConfigError('LMD-571', path=str(self.path), reason=f'it is larger than {MAX_BYTES} bytes')
            return msgspec.json.decode(self.path.read_bytes(), type=list[Saved])
        except FileNotFoundError:
            return []
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError('LMD-571', path=str(self.path), reason=str(error)[:200]) from error

    def later(self, nodes: Iterable[Node], common_key: str | None = None) -> None:
        """Write ``nodes``, as they are then, soon; but for those with another key than ``common_key``."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(DELAY_SECONDS, self.write, nodes, common_key)

    def flush(self, nodes: Iterable[Node], common_key: str | None = None) -> None:
        """Write what is waiting to be written."""
        if self._timer is not None:
            self.write(nodes, common_key)

    def write(self, nodes: Iterable[Node], common_key: str | None = None) -> None:
        """Replace the file as a whole. A disk that takes nothing is told to the log, and is no reason to stop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        saved = [Saved(node.url, node.models, node.speed) for node in nodes
                 if node.api_key in (None, common_key)]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f'.{self.path.name}-')  # mode 0600
            try:
                with os.fdopen(handle, 'wb') as file:
                    file.write(msgspec.json.encode(saved))
                os.replace(name, self.path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            get_logger().warning('the nodes could not be written to %s: %s', self.path, error)


def default_path(port: int) -> Path:
    """Where the proxy on this port keeps its nodes."""
    return env.cache_dir() / 'proxy' / f'{port}.json'

"""Transport between processes: torch.distributed, with NCCL between GPUs and gloo between CPUs.

Ranks meet at a store. Groups are made directly and not through the process's default one, so that nothing is read from
the environment, and several engines can live in one process.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmdeploy.parallel.group import Group

LOOPBACK = '127.0.0.1'
MEET_SECONDS = 120  # until all ranks are there
STEP_SECONDS = 24 * 3600  # ranks that hang are found, and ended, by whoever started them


def local_store(folder: Path, size: int) -> dist.Store:
    """Where ranks of one machine meet: a file in ``folder``, and no port that others could reach."""
    return dist.FileStore(str(folder / 'store'), size)


def connect(store: dist.Store, rank: int, size: int, device: torch.device, name: str = 'model') -> Group:
    """The group of ``size`` ranks; all of them call this, and it returns when they have met.

    Args:
        device: where tensors lie, of this rank.
        name: of the group within the store.
    """
    own = dist.PrefixStore(name, store)
    backend: Any
    if device.type == 'cpu':
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        options._timeout = timedelta(seconds=MEET_SECONDS)
        backend = dist.ProcessGroupGloo(own, rank, size, options)
    else:
        backend = dist.ProcessGroupNCCL(own, rank, size, dist.ProcessGroupNCCL.Options())
    group = Group(rank, size, Distributed(backend, size), device)
    group.all_reduce(torch.zeros(1, device=device))  # the connections are made by the first exchange
    backend.set_timeout(timedelta(seconds=STEP_SECONDS))
    return group


class Distributed:
    """A :class:`~lmdeploy.parallel.group.Transport` over one backend of torch.distributed, ``gloo`` or ``nccl``."""

    def __init__(self, backend: Any, size: int) -> None:
        self._backend, self._size = backend, size

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._backend.allreduce(x).wait()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(self._size, *x.shape)
        self._backend.allgather(list(out), x).wait()
        return out

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        self._backend.broadcast(x, source).wait()
        return x

    def abort(self) -> None:
        """Leave at once: exchanges that wait for other ranks fail."""
        self._backend.abort()

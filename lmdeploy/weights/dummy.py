"""DummyCheckpoint: random weights of the right shapes, for measuring speed without a model's files.

Values are drawn on the device that the model runs on, so that a model of any size is there in seconds. Matrices are
normal with a deviation of 0.02, as models are initialised; norms pass everything through unchanged. The numbers depend
on the seed and the order of pulling only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmdeploy.errors import LoadError
from lmdeploy.weights.bytefile import ByteFile
from lmdeploy.weights.checkpoint import Checkpoint, StoredTensor
from lmdeploy.weights.folder import read_json

DEVIATION = 0.02


class _NoFile(ByteFile):
    """Stands for the file of tensors that lie in none."""

    __slots__ = ()

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0

    def close(self) -> None:
        return None


class DummyCheckpoint(Checkpoint):
    """A checkpoint of the tensors ``shapes``, whose values are made when they are pulled.

    Args:
        path: where ``config`` comes from, for messages.
        config: the content of config.json.
        shapes: name -> shape.
        device: where tensors are made.
    """

    dummy = True

    def __init__(self, path: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]],
                 device: torch.device) -> None:
        file = _NoFile(path)
        tensors = {name: StoredTensor(file, name, 'F32', shape, 0, 0) for name, shape in shapes.items()}
        super().__init__(path, tensors, config, {})
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def upload_to(self, device: torch.device) -> None:
        """Nothing: tensors are made where they belong."""

    def get(self, name: str, shape: tuple[int | None, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A random tensor; see :meth:`Prefix.get`."""
        stored = self.stored(name)
        if shape is not None and (len(shape) != len(stored.shape) or any(
                wanted not in (None, found) for wanted, found in zip(shape, stored.shape))):
            raise LoadError('LMD-133', tensor=name, file=self.path, found=list(stored.shape), wanted=list(shape))
        self._used.add(name)
        tensor = torch.empty(stored.shape, dtype=dtype or torch.float32, device=self._device)
        if 'norm' in name.rpartition('.')[0].rpartition('.')[2]:
            return tensor.fill_(1.0)
        return tensor.normal_(0.0, DEVIATION, generator=self._generator)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder, or the JSON file itself.

    Raises:
        LoadError: LMD-122: it is missing or no JSON object.
    """
    return read_json(path / 'config.json' if path.is_dir() else path)

"""Which checkpoint format each linear layer is read with."""

from __future__ import annotations

from dataclasses import dataclass

from lmdeploy.errors import LoadError
from lmdeploy.quant.formats.base import WeightFormat
from lmdeploy.quant.formats.dense import DenseFormat
from lmdeploy.weights.checkpoint import Prefix


@dataclass(frozen=True, slots=True)
class QuantPolicy:
    """The formats that a checkpoint may hold, in the order in which they are tried for every layer."""

    formats: tuple[WeightFormat, ...] = (DenseFormat(),)

    def format(self, prefix: Prefix) -> WeightFormat:
        """The format of the layer below ``prefix``.

        Raises:
            LoadError: LMD-132: there is no such layer in any known format.
        """
        names = prefix.tensors()
        found = next((f for f in self.formats if f.detect(names)), None)
        if found is None:
            raise LoadError('LMD-132', tensor=f'{prefix.path}.weight', file=prefix.checkpoint.path)
        return found

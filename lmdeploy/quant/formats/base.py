"""The face of a checkpoint format: how the parameters of one linear layer are stored in files."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.weights.checkpoint import Prefix


class WeightFormat(Protocol):
    """One storage format. ``load(save(b))`` gives ``b`` again."""

    name: str

    def detect(self, tensors: list[str]) -> bool:
        """Whether a layer with these tensor names (``['weight', 'bias']``, ...) can be of this format."""

    def load(self, prefix: Prefix, dtype: torch.dtype) -> LinearBundle:
        """The layer below ``prefix``; floating-point parts (weight, scales, bias) come in ``dtype``.

        Raises:
            LoadError: a tensor is missing or has the wrong shape or type; names tensor and file.
        """

    def save(self, bundle: LinearBundle) -> dict[str, Tensor]:
        """The tensors to store, by their names below the layer's prefix."""

    def dequant(self, bundle: LinearBundle) -> Tensor:
        """The weight ``[out, in]`` that the layer multiplies with, in the bundle's floating-point type."""

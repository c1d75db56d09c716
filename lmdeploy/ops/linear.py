"""Dense linear: the product of a layer's inputs with a plain weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lmdeploy.ops.table import op


@op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``: ``x [..., in]``, ``weight [out, in]``, ``bias [out]`` or None give ``[..., out]``."""
    return F.linear(x, weight, bias)

"""Changes to logits that a CPU does better in another way."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.ops import logits as reference


@reference.contain_non_finite.impl('cpu')
def contain_non_finite(logits: Tensor) -> Tensor:
    """See :func:`lmdeploy.ops.logits.contain_non_finite`; looks before it writes."""
    finite = logits.sum(-1).isfinite()
    if not finite.all():
        logits[torch.nonzero(~finite).squeeze(-1)] = 0.0
    return finite

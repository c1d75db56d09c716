"""Build: what every module is given when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lmdeploy.parallel.group import ALONE, Group
from lmdeploy.quant.policy import QuantPolicy


@dataclass(frozen=True, slots=True)
class Build:
    """Type and place of the activations, the ranks that share the model, and how its layers are stored."""

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))
    group: Group = ALONE
    policy: QuantPolicy = field(default_factory=QuantPolicy)

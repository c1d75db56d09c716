"""Build: what every module is given when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lmdeploy.parallel.group import ALONE, Group
from lmdeploy.quant.policy import QuantPolicy


@dataclass(frozen=True, slots=True)
class Build:
    """Type and place of the activations, the ranks that share the model, how its layers and its cache are stored.

    Attributes:
        exact: block-quantised weights of GGUF files become dense ones when they load.
        head: what the codes of the output head are: ``'int8'`` or ``'float8_e4m3fn'``; ``''``: as it is stored.
        kv_bits: of the codes in the KV cache; 0: it holds numbers of ``dtype``.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))
    group: Group = ALONE
    policy: QuantPolicy = field(default_factory=QuantPolicy)
    kv_bits: int = 0
    exact: bool = False
    head: str = ''

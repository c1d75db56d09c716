"""A decoder layer over whole sequences, without a cache: dense float32, each linear's inputs shown on the way.

The same arithmetic as :mod:`lmdeploy.models.decoder`, whose logits tests compare it with. It is differentiable in
weights and inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.config.model import SLIDING
from lmdeploy.lite.recipe import LayerWeights, SiteName
from lmdeploy.lite.source import Source
from lmdeploy.nn.rotary import Rotary
from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.ops.norm import rms_norm
from lmdeploy.ops.rope import rope

Visit = Callable[[SiteName, Tensor], Tensor]
"""Shown a site's inputs ``[..., in]``; what it returns is multiplied in their place."""


def unchanged(site: SiteName, x: Tensor) -> Tensor:
    return x


@dataclass(slots=True)
class Layers:
    """What the layers of a model share: ropes, the activation, sizes."""

    source: Source
    ropes: tuple[Rotary, Rotary]  # of full and of sliding layers

    @staticmethod
    def of(source: Source, device: torch.device) -> Layers:
        config = source.config
        return Layers(source, (Rotary(config.rope, device), Rotary(config.local_rope, device)))

    def __call__(self, layer: LayerWeights, x: Tensor, visit: Visit = unchanged,
                 weights: Mapping[str, Tensor] | None = None) -> Tensor:  # fmt: skip
        """The layer's outputs.

        Args:
            x: ``[sequences, length, hidden]``.
            visit: see :data:`Visit`.
            weights: dense weights ``[out, in]`` by role in the place of the layer's own.
        """
        config, norms = self.source.config, layer.norms
        used = weights or {role: linear.weight for role, linear in layer.linears.items()}

        def norm(role: str, values: Tensor) -> Tensor:
            return rms_norm.reference(values, norms[role], config.rms_norm_eps)

        def linear(role: str, values: Tensor) -> Tensor:
            bias = layer.linears[role].bias
            return F.linear(values, used[role].to(values.dtype), None if bias is None else bias.to(values.dtype))

        inputs = visit('qkv', norm('attention', x))
        attended = self._attend(layer, *(linear(role, inputs) for role in 'qkv'))
        out = linear('o', visit('o', attended))
        x = x + (norm('attention_post', out) if 'attention_post' in norms else out)
        inputs = visit('gate_up', norm('mlp', x))
        inner = ACTIVATIONS[config.activation].reference(torch.cat([linear(r, inputs) for r in ('gate', 'up')], -1))
        out = linear('down', visit('down', inner))
        return x + (norm('mlp_post', out) if 'mlp_post' in norms else out)

    def _attend(self, layer: LayerWeights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention: ``[n, s, heads * head_dim]`` of the same."""
        config, n, s = self.source.config, q.shape[0], q.shape[1]
        q, k, v = (t.view(n, s, -1, config.head_dim) for t in (q, k, v))
        if 'q' in layer.norms:
            q, k = (rms_norm.reference(t, layer.norms[role], config.rms_norm_eps) for role, t in (('q', q), ('k', k)))
        sliding = config.layer_types[layer.index] == SLIDING
        cos, sin = self.ropes[sliding](torch.arange(s, dtype=torch.int32, device=q.device))
        q, k = (rope.reference(t, cos, sin).to(v.dtype).transpose(1, 2) for t in (q, k))
        window, mask = self.source.window(layer.index), None
        if 0 < window < s:
            at = torch.arange(s, device=q.device)
            mask = (at[:, None] >= at) & (at[:, None] - at < window)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
                                             scale=config.attention_scalar**-0.5, enable_gqa=True)  # fmt: skip
        return out.transpose(1, 2).reshape(n, s, -1)

"""A folder of any format against its control, window by window: losses, divergence, agreement.

One forward pass for all: every format is read as anybody would read it, dequantised to float32, and multiplied in
float32; inputs that a format rounds are rounded as its kernels round them, and keys and values as the cache stores
them. So figures differ by what was stored and by nothing else, and a model against itself gives exactly 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy.config.model import ModelConfig
from lmdeploy.lite.layer import Layers
from lmdeploy.lite.recipe import ROLES, LayerWeights, LinearWeights, Recipe, SiteName
from lmdeploy.lite.source import Source
from lmdeploy.models.registry import decoder_spec
from lmdeploy.nn.rotary import Rotary
from lmdeploy.ops.kv_codes import KeyBasis, dequantise, quantise
from lmdeploy.ops.norm import rms_norm
from lmdeploy.ops.rope import rope
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.policy import QuantPolicy
from lmdeploy.quant.transform import plain_weight
from lmdeploy.weights.checkpoint import open_checkpoint

ROWS = 512  # tokens whose logits exist at once
SAMPLE, SPREAD = 256, 8  # random tokens by which the engine chooses the axes of 4-bit keys; steps of their positions


@dataclass(slots=True)
class Model:
    """All layers of a folder, dense on one device.

    Attributes:
        rounding: of every layer, the bundles whose inputs are rounded, by site.
    """

    source: Source
    layers: list[LayerWeights]
    rounding: list[dict[SiteName, LinearBundle]]
    embedding: Tensor
    norm: Tensor
    head: Tensor
    bases: dict[int, KeyBasis] = field(default_factory=dict)


@dataclass(slots=True)
class CachedLayers(Layers):
    """Layers whose keys and values went through a cache of ``bits``; ``bases``: of their keys, by layer."""

    bits: int = 16
    bases: dict[int, KeyBasis] = field(default_factory=dict)
    finding: bool = False  # the bases, by what comes

    def _attend(self, layer: LayerWeights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config, (n, s) = self.source.config, q.shape[:2]
        if self.bits == 16 and not self.finding:
            return super(CachedLayers, self)._attend(layer, q, k, v)
        bias = layer.linears['k'].bias
        offset = torch.zeros_like(k[0, 0]) if bias is None else bias
        dim = config.head_dim
        positions = torch.arange(s, dtype=torch.int32, device=k.device) * (SPREAD if self.finding else 1)
        cos, sin = self.ropes[0](positions)
        moved = rope.reference((k - offset).view(n, s, -1, dim), cos, sin)
        given = rope.reference(offset.expand(1, s, -1).view(1, s, -1, dim), cos, sin)
        queries = rope.reference(q.view(n, s, -1, dim), cos, sin)
        if self.finding:
            self.bases[layer.index] = KeyBasis.of(queries[0], moved[0])
            return super(CachedLayers, self)._attend(layer, q, k, v)
        if self.bits == 4:
            basis = self.bases[layer.index]
            coded = dequantise(*quantise(torch.einsum('nskd,kde->nske', moved, basis.keys), 4), dim)
            moved = torch.einsum('nske,kde->nskd', coded, basis.queries)
        else:
            moved = dequantise(*quantise(moved, self.bits), dim)
        keys = moved + given
        values = dequantise(*quantise(v.view(n, s, -1, dim), self.bits), dim)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (queries, keys, values)), is_causal=True,
                                             scale=config.attention_scalar**-0.5, enable_gqa=True)  # fmt: skip
        return out.transpose(1, 2).reshape(n, s, -1)


@dataclass(slots=True)
class Window:
    """One window of one text: sums over its predicted tokens. ``before``, ``after``: losses in nats."""

    text: str
    window: int
    tokens: int
    before: float
    after: float
    kl: float
    same: int


def load(folder: Path, device: torch.device) -> Model:
    """A model folder in any format that the engine reads."""
    checkpoint = open_checkpoint(folder)
    config = ModelConfig.from_dict(checkpoint.config)
    spec, prefix = decoder_spec(config), checkpoint.prefix()
    source = Source(checkpoint, config, spec, prefix.child(spec.names.roots[0]), prefix.child(spec.names.heads[0]), (),
                    torch.bfloat16)  # fmt: skip
    policy = QuantPolicy(config.quantization)
    names, layers, rounding = source.linear_names(), [], []
    for i in range(config.num_layers):
        below = checkpoint.prefix(source.layer_path(i))
        linears: dict[str, LinearWeights] = {}
        rounded: dict[SiteName, LinearBundle] = {}
        for site, roles in ROLES.items():
            for role in roles:
                here = below.child(names[role])
                bundle = policy.format(here).load(here, torch.float32)
                for part in ('weight', 'codes', 'scales', 'zeros', 'bias', 'perm'):
                    if (tensor := getattr(bundle, part)) is not None:
                        setattr(bundle, part, tensor.to(device))
                weight = plain_weight(bundle)
                linears[role] = LinearWeights(role, names[role], weight, bundle.bias)
                if bundle.scheme.activation:
                    bundle.weight = bundle.codes = bundle.scales = bundle.zeros = None
                    rounded[site] = bundle
        norms = {role: source.read_norm(below.child(name), device) for role, name in source.norm_names().items()}
        layers.append(LayerWeights(i, linears, norms, config.num_heads, config.num_kv_heads, config.head_dim))
        rounding.append(rounded)
    top = source.top(device)
    return Model(source, layers, rounding, top.embedding, top.norm, top.head)


@torch.no_grad()
def hidden(model: Model, ids: Tensor, bits: int = 16) -> Tensor:
    """``[n, length]`` token ids to ``[n, length, hidden]``, normalised; ``bits``: of the cache."""
    if bits == 4 and not model.bases:
        found = torch.randint(len(model.embedding), (SAMPLE,), generator=torch.Generator().manual_seed(0))
        _forward(model, found[None], CachedLayers(model.source, _ropes(model), 16, model.bases, finding=True))
    return _forward(model, ids, CachedLayers(model.source, _ropes(model), bits, model.bases))


def _ropes(model: Model) -> tuple[Rotary, Rotary]:
    return Layers.of(model.source, model.embedding.device).ropes


def _forward(model: Model, ids: Tensor, layers: CachedLayers) -> Tensor:
    x = model.embedding[ids.to(model.embedding.device)] * model.source.spec.embedding_scale
    for layer, rounded in zip(model.layers, model.rounding):

        def visit(site: SiteName, values: Tensor, rounded: dict[SiteName, LinearBundle] = rounded) -> Tensor:
            if site not in rounded:
                return values
            return Recipe.inputs(None, rounded[site], values.flatten(0, -2)).view(values.shape)  # type: ignore[arg-type]

        x = layers(layer, x, visit)
    return rms_norm.reference(x, model.norm, model.source.config.rms_norm_eps)


@torch.no_grad()
def compare(text: str, window: int, ids: Tensor, exact: Tensor, found: Tensor, exact_head: Tensor,
            found_head: Tensor) -> Window:  # fmt: skip
    """Predictions from two hidden states ``[length, hidden]`` of the same tokens ``ids [length]``."""
    sums, same, count = torch.zeros(3, dtype=torch.float64), 0, len(ids) - 1
    for start in range(0, count, ROWS):
        rows = slice(start, min(start + ROWS, count))
        wanted = ids[rows.start + 1 : rows.stop + 1].to(exact.device).long()
        first = F.linear(exact[rows], exact_head).log_softmax(-1)
        second = F.linear(found[rows], found_head).log_softmax(-1)
        losses = (-log.gather(1, wanted[:, None]).sum(dtype=torch.float64) for log in (first, second))
        divergence = (first.exp() * (first - second)).sum(-1).clamp(min=0).sum(dtype=torch.float64)
        sums += torch.stack([*losses, divergence]).cpu()
        same += int((first.argmax(-1) == second.argmax(-1)).sum())
    before, after, kl = sums.tolist()
    return Window(text, window, count, before, after, kl, same)


class Results:
    """Windows that are done, one line of JSON each, so that a run that ends goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.windows: dict[tuple[str, str, int], Window] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                variant = entry.pop('variant')
                self.windows[variant, entry['text'], entry['window']] = Window(**entry)

    def done(self, variant: str, text: str, window: int) -> bool:
        return (variant, text, window) in self.windows

    def add(self, variant: str, window: Window) -> None:
        self.windows[variant, window.text, window.window] = window
        with open(self.path, 'a') as file:
            file.write(json.dumps({'variant': variant} | asdict(window)) + '\n')

    def of(self, variant: str) -> list[Window]:
        return [window for (name, _, _), window in self.windows.items() if name == variant]

    def variants(self) -> Iterator[str]:
        yield from dict.fromkeys(name for name, _, _ in self.windows)


@dataclass(frozen=True, slots=True)
class Summary:
    """Means over windows with their standard errors: ``loss``: of the difference in nats, ``kl`` in nats, ``increase``:
    of the perplexity, ``agreement``: share of equal first choices."""

    tokens: int
    before: float
    loss: float
    loss_error: float
    increase: float
    increase_error: float
    kl: float
    kl_error: float
    agreement: float


def summarise(windows: list[Window]) -> Summary:
    tokens = sum(w.tokens for w in windows)
    before = sum(w.before for w in windows) / tokens
    loss = sum(w.after - w.before for w in windows) / tokens
    error = standard_error([(w.after - w.before) / w.tokens for w in windows])
    return Summary(tokens, math.exp(before), loss, error, math.expm1(loss), math.exp(loss) * error,
                   sum(w.kl for w in windows) / tokens, standard_error([w.kl / w.tokens for w in windows]),
                   sum(w.same for w in windows) / tokens)  # fmt: skip


def standard_error(values: list[float]) -> float:
    """Of a mean of windows; 0 for one, which tells nothing of it."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))

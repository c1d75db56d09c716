"""Mixed precision: which site gets how many bits, so that the model fits a size and loses the least.

Every site is rounded by GPTQ to every offered width, once, on its own; what is lost, ``tr(D H D^T)`` relative to the
energy of its outputs, is its sensitivity. Choosing one width per site under a limit of bytes is a knapsack. On the
lower convex hull of each site's bytes and losses the steps with the steepest fall per byte are taken first, which is
the optimum but for the last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from lmdeploy.config.quantization import PACK, Storage
from lmdeploy.errors import ConfigError
from lmdeploy.lite import gptq
from lmdeploy.lite.driver import Watch, nobody, survey
from lmdeploy.lite.grid import Grid
from lmdeploy.lite.hidden import Hidden
from lmdeploy.lite.recipe import Effort, Site, SiteName, SiteStatistics
from lmdeploy.lite.rotated import GPTQ, Rotation, scale_type, turned
from lmdeploy.lite.source import Source

BITS = (2, 3, 4, 8)
Place = tuple[int, SiteName]


@dataclass(frozen=True, slots=True)
class Option:
    """One way of storing one site.

    Attributes:
        bytes: of its codes, scales and zero points. weights: how many it stores.
        loss: ``E|W'x - Wx|^2 / E|Wx|^2``.
    """

    place: Place
    storage: Storage
    bytes: int
    weights: int
    loss: float


@dataclass(slots=True)
class Mixed(GPTQ):
    """GPTQ with a storage for every site.

    Args:
        plan: of all sites, by layer and name.
    """

    plan: dict[Place, Storage] = field(default_factory=dict)

    def key(self) -> dict[str, object]:
        plan = {f'{layer} {site}': str(storage) for (layer, site), storage in sorted(self.plan.items())}
        return {**GPTQ.key(self), 'plan': plan}

    def storage(self, layer: int, site: SiteName) -> Storage:
        return replace(self.plan[layer, site], transform=self.blocks.get(site, ''))


def storages(group: int, bits: Sequence[int] = BITS) -> list[Storage]:
    """The offered ways: asymmetric integers in groups; those of 2 bits in groups of at most 64."""
    return [Storage(PACK, bits=n, group=min(group, 64) if n == 2 else group, symmetric=False) for n in bits]


def stored_bytes(storage: Storage, outputs: int, inputs: int) -> int:
    """Bytes of a weight ``[outputs, inputs]``: codes, scales in 16 bits, zero points in as many bits as codes."""
    groups = -(-inputs // storage.group) if storage.group else 1
    extra = 16 if storage.group else 32
    bits = outputs * (inputs * storage.bits + groups * (extra + (0 if storage.symmetric else storage.bits)))
    return -(-bits // 8)


class Survey:
    """Takes the options of every site that it is shown."""

    def __init__(self, recipe: GPTQ, offered: Sequence[Storage]) -> None:
        self.recipe, self.offered = recipe, offered
        self.options: dict[Place, list[Option]] = {}

    def __call__(self, site: Site, statistics: SiteStatistics) -> None:
        weight, hessian, _ = turned(site, statistics, self.recipe.blocks.get(site.name, ''))
        energy = float(((weight @ hessian) * weight).sum(dtype=torch.float64))
        columns, factor = weight.t().contiguous(), gptq.factorise(hessian)
        place, found = (site.layer, site.name), []
        for storage in self.offered:
            grid = Grid.of(storage, scale_type(storage))
            levels = gptq.search(columns, grid, factor.weights)
            codes = gptq.gptq(columns, factor, grid, levels)
            lost = float(gptq.losses(columns, levels.values(codes, grid), hessian).sum(dtype=torch.float64))
            size = sum(stored_bytes(storage, *linear.weight.shape) for linear in site.linears)
            found.append(Option(place, storage, size, weight.numel(), lost / max(energy, 1e-30)))
        self.options[place] = found


def choose(options: Sequence[Sequence[Option]], limit: int) -> list[Option]:
    """One option of each site, in all at most ``limit`` bytes, with the least sum of losses (but for one step).

    Raises:
        ValueError: even the smallest options are larger.
    """
    hulls = [hull(site) for site in options]
    taken = [0] * len(hulls)
    size = sum(site[0].bytes for site in hulls)
    if size > limit:
        raise ValueError(f'the smallest options have {size} bytes')
    steps = [((before.loss - after.loss) / (after.bytes - before.bytes), i, n)
             for i, site in enumerate(hulls) for n, (before, after) in enumerate(zip(site, site[1:]))]  # fmt: skip
    for _, i, n in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        more = hulls[i][n + 1].bytes - hulls[i][n].bytes
        if taken[i] == n and size + more <= limit:
            taken[i], size = n + 1, size + more
    return [site[n] for site, n in zip(hulls, taken)]


def hull(options: Sequence[Option]) -> list[Option]:
    """The options that no mixture of two others beats, from the smallest on: bytes rise, and losses fall ever less."""
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.loss)):
        if found and option.loss >= found[-1].loss:
            continue
        while len(found) > 1 and _slope(found[-1], option) >= _slope(found[-2], found[-1]):
            found.pop()
        found.append(option)
    return found


def _slope(first: Option, second: Option) -> float:
    """Loss that a byte less costs between two options."""
    return (first.loss - second.loss) / (second.bytes - first.bytes)


def mixed(source: Source, stream: Hidden, device: torch.device, *, bits: float | None = None, budget: int | None = None,
          group: int = 128, rotation: Rotation = 'native', effort: Effort = 'normal',
          watch: Watch = nobody) -> Mixed:  # fmt: skip
    """Look at the whole model once, then choose.

    Args:
        stream: of the calibration tokens, used up.
        bits: mean bits of a quantised weight, scales and zero points included. budget: bytes of the whole model. One of
            them must be given.
        group: input channels that share a scale, see :func:`storages`.

    Raises:
        ConfigError: LMD-633: no choice is that small; LMD-631, LMD-632.
    """
    offered = storages(group)
    recipe = GPTQ(offered[0], rotation, effort)
    recipe.prepare(source.spec)
    seen = Survey(recipe, offered)
    survey(source, stream, recipe, device, seen, watch)
    options = list(seen.options.values())
    weights = sum(site[0].weights for site in options)
    rest = other_bytes(source, rotation)
    if bits is not None:
        limit, wanted = int(weights * bits / 8), f'{bits:g} bits'
    else:
        assert budget is not None
        limit, wanted = budget - rest, size_text(budget)
    try:
        chosen = choose(options, limit)
    except ValueError:
        least, most = (sum(pick(o.bytes for o in site) for site in options) for pick in (min, max))
        shown = ((f'{8 * size / weights:.2f} bits' for size in (least, most)) if bits is not None
                 else (size_text(size + rest) for size in (least, most)))  # fmt: skip
        low, high = shown
        raise ConfigError('LMD-633', choices=', '.join(map(str, BITS)), wanted=wanted, least=low, most=high) from None
    plan = {option.place: option.storage for option in chosen}
    return Mixed(offered[0], rotation, effort, name='auto', plan=plan)


def other_bytes(source: Source, rotation: Rotation) -> int:
    """Bytes of what is not quantised: embedding, head, norms, biases, and what lies outside of the language model."""
    config, size = source.config, source.dtype.itemsize
    table = config.vocab_size * config.hidden_size
    total = table * size * (1 if config.tie_word_embeddings and rotation != 'portable' else 2)
    small = config.hidden_size * 4 + sum(out for _, out, _ in source.sizes())  # norms and biases of a layer, at most
    total += (small * source.num_layers + config.hidden_size) * size
    return total + sum(source.checkpoint.raw(name).data.nbytes for name in source.others)


def size_text(size: int) -> str:
    return f'{size / 1e9:.2f} GB'

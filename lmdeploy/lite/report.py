"""The report of a run as data: what was asked, what was done, what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from lmdeploy.config.quantization import AWQ, FLOAT, FP8, GPTQ, INT, PACK, SMOOTH, Storage
from lmdeploy.lite.evaluate import Quality
from lmdeploy.lite.recipe import SiteReport
from lmdeploy.lite.source import Source
from lmdeploy.lite.workdir import WorkDir, open_shard

OURS = 'lmdeploy'


@dataclass(slots=True)
class LayerReport:
    """One layer: its sites by name, and how long it took."""

    index: int
    seconds: float
    sites: dict[str, SiteReport]


@dataclass(slots=True)
class CalibrationReport:
    """What the statistics were taken from. ``sha256`` is of the token ids; ``replaced`` says why it is not what was
    asked for, ``reduced`` how many tokens were asked for if it is fewer."""

    name: str
    samples: int
    tokens: int
    sha256: str
    replaced: str = ''
    reduced: int = 0


@dataclass(slots=True)
class Sizes:
    """Bytes of all tensors and bits of one weight of the quantised layers, scales included.

    Attributes:
        before: in 16 bits. stored: in the source's own file, which may be a GGUF file with fewer. after: as written.
    """

    before: int
    stored: int
    after: int
    bits_per_weight: float


@dataclass(slots=True)
class Answer:
    """The same question to both models, greedily."""

    question: str
    before: str
    after: str


@dataclass(slots=True)
class Report:
    """Everything that a run tells; JSON has the same names."""

    key: str
    lmdeploy: str
    command: str
    model: str
    output: str
    scheme: str
    format: str
    recipe: dict[str, object]
    device: str
    dtype: str
    calibration: CalibrationReport | None
    layers: list[LayerReport]
    sizes: Sizes
    seconds: float
    peak_bytes: int
    quality: list[Quality] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    loads_in: dict[str, str] = field(default_factory=dict)
    try_it: str = ''

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def loss(self) -> float:
        """The mean relative loss of all sites."""
        losses = [site.loss for layer in self.layers for site in layer.sites.values()]
        return sum(losses) / max(len(losses), 1)

    def worst(self, count: int = 5) -> list[tuple[int, str, SiteReport]]:
        """The sites with the largest losses: ``(layer, site, its report)``."""
        sites = [(layer.index, name, site) for layer in self.layers for name, site in layer.sites.items()]
        return sorted(sites, key=lambda entry: -entry[2].loss)[:count]


def sizes_of(source: Source, work: WorkDir, linears: Sequence[str]) -> Sizes:
    """Sizes of all tensors; of the ``linears`` (full names) the bits per weight."""
    checkpoint = source.checkpoint
    stored = [checkpoint.stored(name) for name in checkpoint.names()]
    before = sum(2 * prod(tensor.shape) for tensor in stored)
    found = sum(tensor.nbytes for tensor in stored)
    after = sum(record.bytes for record in work.shards.values())
    names, bits = set(linears), 0
    for record in work.shards.values():
        with open_shard(work.path / record.file) as shard:
            for name in shard.names():
                layer, _, kind = name.rpartition('.')
                bits += 8 * shard.stored(name).nbytes if layer in names and kind != 'bias' else 0
    weights = source.num_layers * sum(out * wide for _, out, wide in source.sizes())
    return Sizes(before, found, after, bits / weights)


def loads_in(storage: Storage, extra: bool) -> dict[str, str]:
    """Which programs read a storage: ``'yes'``, ``'no'``, or with what restriction; known from their sources.

    Args:
        extra: the configuration has what an ordinary file has not, such as run-time transforms.
    """
    four_128 = storage.bits == 4 and storage.group == 128
    table = {
        AWQ: ('yes' if storage.group == 128 else 'groups of 128 only', 'yes', 'yes', 'with gptqmodel'),
        GPTQ: ('yes' if four_128 and storage.symmetric else 'symmetric 4 bits in groups of 128 only',
               'yes' if storage.symmetric and storage.bits in (4, 8) else 'symmetric 4 and 8 bits only',
               'yes' if storage.symmetric and storage.bits in (4, 8) else 'symmetric 4 and 8 bits only',
               'with gptqmodel'),
        PACK: ('yes' if storage.bits == 4 and not storage.activation else 'no', 'yes',
               'yes' if storage.bits in (4, 8) and not storage.activation else 'no',
               'yes' if storage.symmetric else 'symmetric only'),  # compressed-tensors 0.20 loses packed zero points
        INT: ('no', 'yes', 'yes', 'yes'),
        FLOAT: ('no', 'yes', 'yes', 'yes'),
        FP8: ('yes', 'yes', 'yes', 'yes'),
        SMOOTH: ('PyTorch engine', 'no', 'no', 'no'),
    }  # fmt: skip
    names = ('LMDeploy of InternLM', 'vLLM', 'SGLang', 'transformers')
    found = dict(zip(names, table[storage.format]))
    if extra or storage.transform:  # which others do not know or, worse, pass over in silence
        found |= {'LMDeploy of InternLM': 'no', 'SGLang': 'no', 'transformers': 'no'}
    return {OURS: 'yes'} | found


def to_json(report: Report) -> str:
    return json.dumps(report.as_json(), indent=2, ensure_ascii=False) + '\n'


def from_json(text: str) -> Report:
    """The inverse of :func:`to_json`."""
    raw = json.loads(text)
    raw['calibration'] = CalibrationReport(**raw['calibration']) if raw['calibration'] else None
    raw['layers'] = [LayerReport(layer['index'], layer['seconds'],
                                 {name: SiteReport(**site) for name, site in layer['sites'].items()})
                     for layer in raw['layers']]  # fmt: skip
    raw['sizes'] = Sizes(**raw['sizes'])
    raw['quality'] = [Quality(**entry) for entry in raw['quality']]
    raw['answers'] = [Answer(**entry) for entry in raw['answers']]
    return Report(**raw)

"""The layer-wise driver: one decoder layer after the other, read, fitted, written, read back, passed through.

Memory holds one layer, its statistics and the hidden states of the calibration tokens; never the model. A layer that an
earlier run has finished is only passed through, by the same path, so that a resumed run gives the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lmdeploy.lite.hidden import Hidden
from lmdeploy.lite.layer import Layers
from lmdeploy.lite.recipe import (
    ROLES,
    SITES,
    Block,
    Fitted,
    LayerWeights,
    LinearWeights,
    Recipe,
    Site,
    SiteName,
    SiteReport,
    SiteStatistics,
)
from lmdeploy.lite.source import Source, packed_rows
from lmdeploy.lite.statistics import Gatherer
from lmdeploy.lite.workdir import WorkDir, open_shard
from lmdeploy.quant.bundle import LinearBundle
from lmdeploy.quant.formats.base import WeightFormat
from lmdeploy.quant.formats.dense import DenseFormat
from lmdeploy.quant.policy import FORMATS
from lmdeploy.quant.rows import join, take_outputs
from lmdeploy.quant.scheme import dense_scheme
from lmdeploy.weights.checkpoint import Checkpoint, Prefix


@dataclass(frozen=True, slots=True)
class Event:
    """What the driver has just begun or done, for a progress display.

    Attributes:
        what: ``'read'``, ``'statistics'``, ``'fit'`` (of ``site``), ``'fitted'`` (with its report), ``'tune'``,
            ``'write'``, ``'resume'``, ``'forward'``, ``'layer'`` (done).
    """

    what: str
    layer: int
    site: str = ''
    report: SiteReport | None = None


Watch = Callable[[Event], None]


def nobody(event: Event) -> None:
    return None


@dataclass(slots=True)
class Streams:
    """Hidden states that travel through the layers.

    Attributes:
        calibration: behind quantised layers. calibration_float: behind the recipe's transformed ones, where it needs
            both.
        held_out: texts on which the result is judged, behind quantised layers. held_out_float: behind the model's own.
    """

    calibration: Hidden
    calibration_float: Hidden | None = None
    held_out: Hidden | None = None
    held_out_float: Hidden | None = None


class Driver:
    """Quantises ``source`` by ``recipe`` into ``work``.

    Args:
        streams: with their sequences; the driver fills and moves them.
        device: where layers are computed. watch: told of every step.
    """

    def __init__(self, source: Source, recipe: Recipe, work: WorkDir, streams: Streams, device: torch.device,
                 watch: Watch = nobody) -> None:  # fmt: skip
        self.source, self.recipe, self.work, self.streams = source, recipe, work, streams
        self.device, self.watch = device, watch
        self.layers = Layers.of(source, device)

    @torch.no_grad()
    def run(self) -> None:
        """All of it.

        Raises:
            LoadError: LMD-602 values that are not finite, and what reading raises.
        """
        streams = self.streams
        if 0 not in self.work.shards:
            self._write_top()
        with self.open_shard(0) as shard:
            embedding = shard.get(self.source.top_names()['embedding']).to(self.device)
        scale = embedding_scale(self.source)
        for stream in (streams.calibration, streams.calibration_float, streams.held_out):
            if stream is not None:
                stream.fill(embedding, scale)
        if streams.held_out_float is not None:
            streams.held_out_float.fill(self.source.read_embedding(self.device), scale)
        del embedding
        for i in range(self.source.num_layers):
            self._layer(i)

    def open_shard(self, index: int) -> Checkpoint:
        """A file that is done: 0 is what lies outside of the layers, i + 1 is layer i."""
        return open_shard(self.work.path / self.work.shards[index].file)

    # -- one layer -----------------------------------------------------------------------------------------------------

    def _layer(self, index: int) -> None:
        streams = self.streams
        self.watch(Event('read', index))
        layer = self.source.layer(index, self.device)
        original = None if streams.held_out_float is None else _copy(layer)
        self.recipe.transform(layer)
        transformed = None if streams.calibration_float is None else _copy(layer)
        if index + 1 in self.work.shards:
            self.watch(Event('resume', index))
        else:
            self._quantise(layer)
        if index + 1 < self.source.num_layers or streams.held_out is not None:
            self.watch(Event('forward', index))
            self._advance(index)
            for stream, weights in ((streams.calibration_float, transformed), (streams.held_out_float, original)):
                if stream is not None and weights is not None:
                    _forward(stream, partial(self.layers, weights))
        self.watch(Event('layer', index))

    def _quantise(self, layer: LayerWeights) -> None:
        started = time.perf_counter()
        index, recipe = layer.index, self.recipe
        sites = sites_of(layer)
        wanted = [name for name in SITES if recipe.storage(index, name) is not None]
        self.watch(Event('statistics', index))
        statistics = self._statistics(layer, sites, wanted)
        before = {name: statistics[name].outlier for name in wanted}
        after = dict(before)
        for name in ('down', 'o', 'gate_up', 'qkv'):  # before what they are folded into is fitted
            if name in wanted and (scale := recipe.scale(sites[name], statistics[name])) is not None:
                self._fold(layer, sites[name], scale, statistics[name])
                after[name] = statistics[name].outlier
        fitted: dict[SiteName, Fitted] = {}
        for name in wanted:
            self.watch(Event('fit', index, name))
            fitted[name] = recipe.fit(sites[name], statistics.pop(name))
            fitted[name].report.outliers = round(before[name], 2), round(after[name], 2)
            self.watch(Event('fitted', index, name, fitted[name].report))
        self.watch(Event('tune', index))
        with torch.enable_grad():
            recipe.tune(Block(layer, fitted, lambda: self._pieces(layer),
                              lambda x, weights: self.layers(layer, x, weights=weights)))  # fmt: skip
        self.watch(Event('write', index))
        tensors = self._tensors(layer, fitted)
        reports = {str(name): one.report for name, one in fitted.items()}
        self.work.write_shard(index + 1, shard_name(index + 1, self.source.num_layers + 1), tensors,
                              time.perf_counter() - started, reports)  # fmt: skip

    def _statistics(self, layer: LayerWeights, sites: Mapping[SiteName, Site],
                    wanted: Sequence[SiteName]) -> dict[SiteName, SiteStatistics]:  # fmt: skip
        stream, needs = self.streams.calibration, self.recipe.needs
        path = self.source.layer_path(layer.index)
        gatherers = {name: Gatherer(f'{path} ({name})', sites[name].in_features, stream.tokens, needs, self.device)
                     for name in wanted}  # fmt: skip
        exact = self.streams.calibration_float
        for piece, x in stream:
            inputs = {} if exact is None else self._inputs(layer, exact.read(piece))

            def visit(site: SiteName, values: Tensor, inputs: dict[SiteName, Tensor] = inputs) -> Tensor:
                if site in gatherers:
                    gatherers[site].add(values, inputs.get(site))
                return values

            self.layers(layer, x, visit)
        return {name: gatherer.finish() for name, gatherer in gatherers.items()}

    def _inputs(self, layer: LayerWeights, x: Tensor) -> dict[SiteName, Tensor]:
        found: dict[SiteName, Tensor] = {}
        self.layers(layer, x, lambda site, values: found.setdefault(site, values))
        return found

    def _fold(self, layer: LayerWeights, site: Site, scale: Tensor, statistics: SiteStatistics) -> None:
        """Divide the producer by ``scale`` and multiply the inputs' columns; exact as the producer will be stored."""
        if site.name in ('qkv', 'gate_up'):
            role = 'attention' if site.name == 'qkv' else 'mlp'
            norm = layer.norms[role]
            stored = self.source.stored_norm(norm / scale).float() + (1.0 if self.source.spec.norm_plus_one else 0.0)
            scale = torch.where((norm == 0) | (stored == 0), torch.ones_like(norm), norm / stored)
            layer.norms[role] = torch.where((norm == 0) | (stored == 0), norm, stored)
        else:
            producer = layer.linears['v' if site.name == 'o' else 'up']
            producer.weight = producer.weight / scale[:, None]
            if producer.bias is not None:
                producer.bias = producer.bias / scale
        spread = scale[site.tie]
        for linear in site.linears:
            linear.weight = linear.weight * spread
        statistics.scaled(spread)

    def _pieces(self, layer: LayerWeights) -> Iterator[tuple[Tensor, Tensor]]:
        exact = self.streams.calibration_float
        for piece, x in self.streams.calibration:
            with torch.no_grad():
                y = self.layers(layer, (x if exact is None else exact.read(piece)).float())
            yield x.float(), y

    def _advance(self, index: int) -> None:
        """Move the streams behind quantised layers through the layer as it lies in its file."""
        with self.open_shard(index + 1) as shard:
            if self.device.type != 'cpu':
                shard.upload_to(self.device)
            layer, bundles = self._read_back(shard.prefix(self.source.layer_path(index)), index)
        weights = {role: linear.weight for role, linear in layer.linears.items()}

        def visit(site: SiteName, x: Tensor) -> Tensor:
            bundle = bundles.get(site)
            if bundle is None:
                return x
            return self.recipe.inputs(bundle, x.reshape(-1, x.shape[-1])).view(x.shape).to(x.dtype)

        for stream in (self.streams.calibration, self.streams.held_out):
            if stream is not None:
                _forward(stream, lambda x: self.layers(layer, x, visit, weights))

    # -- files ---------------------------------------------------------------------------------------------------------

    def _write_top(self) -> None:
        """Embedding, final norm, head and what is outside of the language model: copied, or as the recipe wants it."""
        source, names = self.source, self.source.top_names()
        started = time.perf_counter()
        tied = source.config.tie_word_embeddings
        if type(self.recipe).transform_top is Recipe.transform_top:
            roles = ('embedding', 'norm') if tied else tuple(names)
            tensors = {names[role]: _plain(source.checkpoint.get(names[role], None, source.dtype)) for role in roles}
        else:
            top = source.top(self.device)
            self.recipe.transform_top(top)
            tensors = {names['norm']: _plain(source.stored_norm(top.norm)),
                       names['embedding']: _plain(top.embedding.to(source.dtype))}  # fmt: skip
            if not top.tied:
                tensors[names['head']] = _plain(top.head.to(source.dtype))
        for name in source.others:
            tensors[name] = _plain(source.checkpoint.raw(name).data)
        self.work.write_shard(0, shard_name(0, source.num_layers + 1), tensors, time.perf_counter() - started, {})

    def _tensors(self, layer: LayerWeights, fitted: Mapping[SiteName, Fitted]) -> dict[str, Tensor]:
        """What the layer's file holds, by full names."""
        source, path = self.source, self.source.layer_path(layer.index)
        tensors = {f'{path}.{name}.weight': _plain(source.stored_norm(layer.norms[role]))
                   for role, name in source.norm_names().items()}  # fmt: skip
        for site in SITES:
            parts: list[tuple[LinearWeights, LinearBundle]] = []
            for role in ROLES[site]:
                linear = layer.linears[role]
                bundle = fitted[site].bundles[role] if site in fitted else _dense_bundle(linear.weight, source.dtype)
                bias = None if linear.bias is None else linear.bias.to(source.dtype)
                parts.append((linear, replace(bundle, bias=bias)))
            form = self._format(layer.index, site)
            if site == 'qkv' and source.spec.names.packed_qkv:
                order = torch.cat(packed_rows(source.config)).argsort().to(self.device)
                parts = [(parts[0][0], take_outputs(join([bundle for _, bundle in parts]), order))]
            for linear, bundle in parts:
                saved = form.save(bundle)  # on the device: packing there is a hundred times as fast
                tensors |= {f'{path}.{linear.name}.{kind}': _plain(tensor) for kind, tensor in saved.items()}
        return tensors

    def _read_back(self, prefix: Prefix, index: int) -> tuple[LayerWeights, dict[SiteName, LinearBundle]]:
        """The layer of a shard: dense weights for plain inputs, and a bundle of each quantised site."""
        source, config = self.source, self.source.config
        linears: dict[str, LinearWeights] = {}
        bundles: dict[SiteName, LinearBundle] = {}
        names = source.linear_names()
        for site in SITES:
            form = self._format(index, site)
            for role in ROLES[site]:
                bundle = form.load(prefix.child(names[role]), torch.float32)
                if site == 'qkv' and source.spec.names.packed_qkv:
                    bundle = take_outputs(bundle, packed_rows(config)['qkv'.index(role)])
                bundle = _to(bundle, self.device)
                if bundle.weight is None:
                    bundles.setdefault(site, bundle)
                linears[role] = LinearWeights(role, names[role], self.recipe.dense(bundle), bundle.bias)
        norms = {role: source.read_norm(prefix.child(name), self.device) for role, name in source.norm_names().items()}
        return LayerWeights(index, linears, norms, config.num_heads, config.num_kv_heads, config.head_dim), bundles

    def _format(self, index: int, site: SiteName) -> WeightFormat:
        storage = self.recipe.storage(index, site)
        return DenseFormat() if storage is None else FORMATS[storage.format](storage)


@torch.no_grad()
def survey(source: Source, stream: Hidden, recipe: Recipe, device: torch.device,
           see: Callable[[Site, SiteStatistics], None], watch: Watch = nobody) -> None:  # fmt: skip
    """Show every site of the unquantised model, transformed by ``recipe``, with the statistics that it needs.

    Nothing is written, and every layer's inputs come from unquantised layers.
    """
    top = source.top(device)
    recipe.transform_top(top)
    stream.fill(top.embedding, embedding_scale(source))
    del top
    layers = Layers.of(source, device)
    for i in range(source.num_layers):
        watch(Event('read', i))
        layer = source.layer(i, device)
        recipe.transform(layer)
        sites, path = sites_of(layer), source.layer_path(i)
        watch(Event('statistics', i))
        gatherers = {name: Gatherer(f'{path} ({name})', sites[name].in_features, stream.tokens, recipe.needs, device)
                     for name in SITES}  # fmt: skip

        def visit(site: SiteName, x: Tensor, gatherers: dict[SiteName, Gatherer] = gatherers) -> Tensor:
            gatherers[site].add(x)
            return x

        for piece, x in stream:
            stream.write(piece, layers(layer, x, visit))
        for name in SITES:
            watch(Event('fit', i, name))
            see(sites[name], gatherers.pop(name).finish())
        watch(Event('layer', i))


def sites_of(layer: LayerWeights) -> dict[SiteName, Site]:
    """The four sites of a layer; their linears are the layer's own."""
    linears, dim = layer.linears, layer.head_dim
    device = linears['o'].weight.device
    group = layer.heads // layer.kv_heads
    heads = torch.arange(layer.heads, device=device) // group
    ties = {
        'qkv': torch.arange(linears['q'].weight.shape[1], device=device),
        'o': (heads[:, None] * dim + torch.arange(dim, device=device)).flatten(),
        'gate_up': torch.arange(linears['gate'].weight.shape[1], device=device),
        'down': torch.arange(linears['down'].weight.shape[1], device=device),
    }
    return {name: Site(layer.index, name, tuple(linears[role] for role in ROLES[name]), ties[name]) for name in SITES}


def shard_name(index: int, count: int) -> str:
    return f'model-{index + 1:05}-of-{count:05}.safetensors'


def embedding_scale(source: Source) -> float:
    """The factor of the embeddings, rounded as :class:`lmdeploy.nn.embedding.Embedding` rounds it."""
    return torch.tensor(source.spec.embedding_scale, dtype=source.dtype).item()


def _forward(stream: Hidden, layer: Callable[[Tensor], Tensor]) -> None:
    for piece, x in stream:
        stream.write(piece, layer(x))


def _copy(layer: LayerWeights) -> LayerWeights:
    """A layer that keeps its tensors when the other's are replaced."""
    return replace(layer, linears={role: replace(linear) for role, linear in layer.linears.items()},
                   norms=dict(layer.norms))  # fmt: skip


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to('cpu').contiguous()


def _dense_bundle(weight: Tensor, dtype: torch.dtype) -> LinearBundle:
    out_features, in_features = weight.shape
    return LinearBundle(dense_scheme(dtype.itemsize * 8), out_features, in_features, weight=weight.to(dtype))


def _to(bundle: LinearBundle, device: torch.device) -> LinearBundle:
    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return replace(bundle, weight=move(bundle.weight), codes=move(bundle.codes), scales=move(bundle.scales),
                   zeros=move(bundle.zeros), bias=move(bundle.bias), perm=move(bundle.perm),
                   input_scale=move(bundle.input_scale))  # fmt: skip

"""Only looking: what the inputs of all linear layers are like, as a file that other tools can read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmdeploy.config.quantization import Storage
from lmdeploy.errors import LoadError
from lmdeploy.lite.awq import AWQ
from lmdeploy.lite.calibration import Calibration
from lmdeploy.lite.driver import Event, Watch, embedding_scale, nobody, sites_of
from lmdeploy.lite.hidden import Hidden
from lmdeploy.lite.layer import Layers
from lmdeploy.lite.recipe import SITES, SiteName
from lmdeploy.lite.source import Source
from lmdeploy.lite.statistics import Gatherer

FILE, FACTS = 'inputs_stats.safetensors', 'calibration.json'


@dataclass(slots=True)
class Observer:
    """Extremes and means of a site's inputs, ``[in] float32`` each."""

    most: Tensor
    least: Tensor
    total: Tensor
    magnitude: Tensor
    tokens: int = 0

    @staticmethod
    def of(width: int, device: torch.device) -> Observer:
        def full(value: float) -> Tensor:
            return torch.full((width,), value, dtype=torch.float64, device=device)

        return Observer(full(-torch.inf), full(torch.inf), full(0.0), full(0.0))

    def add(self, name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        if not bool(torch.isfinite(rows).all()):
            raise LoadError('LMD-602', site=name, channel=int((~torch.isfinite(rows)).any(0).nonzero()[0]))
        self.most, self.least = torch.maximum(self.most, rows.amax(0)), torch.minimum(self.least, rows.amin(0))
        self.total += rows.sum(0)
        self.magnitude += rows.abs().sum(0)
        self.tokens += len(rows)

    def tensors(self) -> dict[str, Tensor]:
        """By the names of LMDeploy's statistics."""
        found = {'max': self.most, 'min': self.least, 'mean': self.total / self.tokens,
                 'absmax': torch.maximum(self.most.abs(), self.least.abs()), 'absmean': self.magnitude / self.tokens}
        return {name: values.float().cpu() for name, values in found.items()}


@torch.no_grad()
def observe(source: Source, calibration: Calibration, folder: Path, device: torch.device, batch: int = 1,
            search: Storage | None = None, watch: Watch = nobody) -> Path:  # fmt: skip
    """Write the statistics of all linear layers' inputs into ``folder``; returns the file.

    Args:
        search: add the scales that AWQ's search would give for weights that are stored so.

    Raises:
        LoadError: LMD-602: an input is not finite.
    """
    from safetensors.torch import save_file

    stream = Hidden(calibration.sequences, source.config.hidden_size, batch, device, folder / 'hidden.bin')
    stream.fill(source.read_embedding(device), embedding_scale(source))
    layers, found = Layers.of(source, device), dict[str, Tensor]()
    recipe = None if search is None else AWQ(search)
    for i in range(source.num_layers):
        watch(Event('read', i))
        layer = source.layer(i, device)
        sites, path = sites_of(layer), source.layer_path(i)
        observers = {name: Observer.of(sites[name].in_features, device) for name in SITES}
        gatherers = {} if recipe is None else {
            name: Gatherer(path, sites[name].in_features, stream.tokens, recipe.needs, device) for name in SITES}

        def visit(site: SiteName, x: Tensor, observers: dict[SiteName, Observer] = observers,
                  gatherers: dict[SiteName, Gatherer] = gatherers, path: str = path) -> Tensor:  # fmt: skip
            observers[site].add(f'{path} ({site})', x)
            if site in gatherers:
                gatherers[site].add(x)
            return x

        watch(Event('statistics', i))
        for piece, x in stream:
            stream.write(piece, layers(layer, x, visit))
        for name in SITES:
            tensors = observers[name].tensors()
            if recipe is not None:
                scale = recipe.scale(sites[name], gatherers[name].finish())
                if scale is not None:
                    tensors['scale'] = scale[sites[name].tie].cpu()
            for linear in sites[name].linears:
                found |= {f'{path}.{linear.name}.{kind}': values for kind, values in tensors.items()}
        watch(Event('layer', i))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / FILE
    save_file({name: tensor.clone().contiguous() for name, tensor in found.items()}, target)
    facts = {'model': str(source.path), 'calibration': calibration.name, 'samples': len(calibration.sequences),
             'tokens': calibration.tokens, 'sha256': calibration.digest, 'replaced': calibration.replaced}  # fmt: skip
    (folder / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    return target

"""Speed of vision encoders with random weights: time and TFLOP/s by the number of tiles, together and one by one.

    python benchmark/vision_encoder.py [shapes:internvl3-1b | FOLDER] [--tiles 1,8,13] [--device cuda]

The share is that of the peak of large square products, measured on the same device. Work is counted as the products of
the linear layers and of attention. Pixels lie on the device already; a call ends when its embeddings are there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lmdeploy.bench import shapes
from lmdeploy.bench.device import DeviceFacts, measure_roof
from lmdeploy.config.vision import VisionModelConfig, read_vision
from lmdeploy.models.vision.encoder import VisionEncoder, build_encoder
from lmdeploy.nn.build import Build
from lmdeploy.runner.graphs import CudaGraphs
from lmdeploy.runner.tile_graphs import MOST, TileGraphs, records
from lmdeploy.weights.dummy import DummyCheckpoint, read_config


def tile_flops(config: VisionModelConfig, weights: dict[str, tuple[int, ...]]) -> float:
    """Of one tile: twice the values of every matrix, times the positions that it is applied to, and attention."""
    tower, positions = config.tower, config.patches_per_tile
    flops = 4.0 * tower.num_layers * positions**2 * tower.hidden_size
    for name, shape in weights.items():
        if len(shape) == 2 and shape[0] != positions:
            rows = positions if 'layer' in name else config.tokens_per_tile
            flops += 2.0 * shape[0] * shape[1] * rows
        elif len(shape) == 4:
            flops += 2.0 * shape[0] * shape[1] * shape[2] * shape[3] * positions
    return flops


def build(path: Path, device: torch.device, dtype: torch.dtype) -> VisionEncoder:
    values = read_config(path)
    encoder = build_encoder(read_vision(values), Build(dtype, device))
    with torch.no_grad():
        encoder.load(DummyCheckpoint(path, values, encoder.shapes(), device).prefix())
    return encoder


def seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    def once() -> float:
        begin = time.perf_counter()
        call()
        if device.type != 'cpu':
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    for _ in range(2):
        once()
    return statistics.median(once() for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', nargs='?', default='shapes:internvl3-1b')
    parser.add_argument('--tiles', default='1,2,4,8,13,26,52')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='bfloat16')
    parser.add_argument('--rounds', type=int, default=10)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    encoder = build(shapes.find(args.model) or Path(args.model), device, dtype)
    config, roof = encoder.config, measure_roof(device, dtype)
    flops = tile_flops(config, encoder.shapes())
    print(f'{DeviceFacts.of(device).name}, peak {roof.peak / 1e12:.0f} TFLOP/s; a tile of {args.model} takes '
          f'{flops / 1e12:.3f} TFLOP', flush=True)
    side = config.tower.image_size

    def pixels(count: int) -> list[torch.Tensor]:
        return [torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, device=device) for _ in range(count)]

    recorded = TileGraphs(encoder, CudaGraphs(device)) if device.type != 'cpu' and records(encoder) else None
    for count in map(int, args.tiles.split(',')):
        tiles = pixels(count)
        together = seconds(lambda: encoder(tiles), device, args.rounds)  # noqa: B023
        line = f'{count:3d} tiles: {together * 1e3:8.2f} ms together, {count * flops / together / 1e12:6.1f} TFLOP/s, '
        line += f'{count * flops / together / roof.peak:4.0%} of the peak'
        if 1 < count <= 16:
            alone = seconds(lambda: [encoder([tile]) for tile in tiles], device, max(2, args.rounds // 2))  # noqa: B023
            line += f'; {alone * 1e3:8.2f} ms one by one, {alone / together:.2f} times that'
        if recorded is not None:
            replayed = seconds(lambda: recorded(tiles), device, args.rounds)  # noqa: B023
            line += f'; {replayed * 1e3:8.2f} ms with graphs' if count <= MOST else ''
        print(line, flush=True)


if __name__ == '__main__':
    main()

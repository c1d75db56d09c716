"""From the start of the program to the first token, with a model's files in the page cache.

    python benchmark/start_up.py --make /dev/shm/model --model llama3-8b     # random weights as safetensors shards
    python benchmark/start_up.py --load /dev/shm/model                       # the second run has warm kernels
"""

from __future__ import annotations

import time

BEGIN = time.perf_counter()  # before the imports, which are a part of it

import argparse  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

from lmdeploy.bench.shapes import find  # noqa: E402
from lmdeploy.config.engine import EngineConfig  # noqa: E402
from lmdeploy.log import set_level  # noqa: E402

SHARD = 4 << 30  # bytes


def make(folder: Path, shape: Path) -> None:
    """Write a model of random weights."""
    import torch
    from safetensors.torch import save_file

    from lmdeploy.config.model import ModelConfig
    from lmdeploy.models.registry import decoder_spec
    from lmdeploy.models.shapes import tensor_shapes
    from lmdeploy.weights.dummy import DummyCheckpoint, read_config

    config = read_config(shape)
    shapes = tensor_shapes(decoder_spec(ModelConfig.from_dict(config)))
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    dummy = DummyCheckpoint(shape, config, shapes, device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    size, total, number = 0, 0, 1
    for at, name in enumerate(shapes):
        shard[name] = dummy.get(name, None, torch.bfloat16).cpu()
        places[name] = f'model-{number:05}.safetensors'
        size += shard[name].nbytes
        if size >= SHARD or at == len(shapes) - 1:
            save_file(shard, folder / places[name])
            shard, total, size, number = {}, total + size, 0, number + 1
    index = {'metadata': {'total_size': total}, 'weight_map': places}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    print(f'{total / 2**30:.1f} GiB in {folder}')


def load(folder: Path, dummy: bool) -> None:
    """Start an engine and generate a token."""
    from lmdeploy.engine.core import EngineCore
    from lmdeploy.engine.request import EngineInput
    from lmdeploy.engine.sampling import SamplingParams
    from lmdeploy.executor.local import LocalExecutor

    set_level('INFO')
    print(f'imports: {time.perf_counter() - BEGIN:.1f} s', flush=True)
    config = EngineConfig(runner='graph', session_len=2048, load_format='dummy' if dummy else 'auto')
    executor = LocalExecutor(config, folder)
    core = EngineCore(executor, executor.start(), depth=2)
    print(f'started: {time.perf_counter() - BEGIN:.1f} s', flush=True)
    core.submit(EngineInput('first', list(range(100, 228)), SamplingParams(max_new_tokens=1)))
    while not core.idle:
        core.step()
    print(f'first token: {time.perf_counter() - BEGIN:.1f} s', flush=True)
    executor.stop()


def main() -> None:
    """Make or load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--make', type=Path, metavar='FOLDER')
    parser.add_argument('--load', type=Path, metavar='FOLDER')
    parser.add_argument('--dummy', action='store_true', help='load config.json only')
    parser.add_argument('--model', default='llama3-8b', help='the shapes of a model: llama3-8b, ...')
    args = parser.parse_args()
    if args.make:
        shape = find(f'shapes:{args.model}')
        assert shape is not None
        make(args.make, shape)
    if args.load:
        load(args.load, args.dummy)


if __name__ == '__main__':
    main()

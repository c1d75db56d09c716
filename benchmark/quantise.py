"""Time and memory of quantising a model's shapes with random weights, and a run that is killed and goes on.

    python benchmark/quantise.py --shapes llama3-8b --layers 8 --kill-after 3 --out result.json

Weights are made from their names, so that no model is needed; tokens are random. The killed run must give the same
bytes as the other one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from lmdeploy.bench.shapes import FOLDER
from lmdeploy.config.quantization import AWQ, GPTQ, PACK, SMOOTH, Storage
from lmdeploy.lite import awq, rotated, smooth
from lmdeploy.lite.calibration import Calibration
from lmdeploy.lite.driver import Event
from lmdeploy.lite.job import Job, Options, choose_device
from lmdeploy.lite.recipe import Recipe
from lmdeploy.lite.source import open_source

RECIPES = {
    'gptq': lambda: rotated.GPTQ(Storage(GPTQ, bits=4, group=128, zero_shift=1), 'portable'),
    'native': lambda: rotated.GPTQ(Storage(PACK, bits=4, group=128, symmetric=False), 'native'),
    'w2': lambda: rotated.GPTQ(Storage(PACK, bits=2, group=64, symmetric=False), 'native'),
    'awq': lambda: awq.AWQ(Storage(AWQ, bits=4, group=128, symmetric=False)),
    'int8': lambda: smooth.SmoothQuant(Storage(SMOOTH, activation='int8')),
}


def run(args: argparse.Namespace) -> None:
    """One run in this process; facts as a line of JSON."""
    device = choose_device(args.device)
    source = open_source(config_of(args), dummy=device)
    recipe: Recipe = RECIPES[args.recipe]()
    recipe.prepare(source.spec)
    chance = torch.Generator().manual_seed(0)
    sequences = [torch.randint(source.config.vocab_size, (args.length,), generator=chance) for _ in range(args.samples)]
    options = Options(Path(args.work), batch_size=args.batch, device=args.device, answers=False)
    job = Job(source, options, device, None, recipe, Calibration(tuple(sequences), 'random'), [])
    times: dict[str, float] = {}
    last = ['', time.perf_counter()]

    def watch(event: Event) -> None:
        now = time.perf_counter()
        times[last[0]] = times.get(last[0], 0.0) + now - last[1]
        last[:] = [event.what, now]

    started = time.perf_counter()
    report = job.run(watch)
    print(json.dumps({'seconds': time.perf_counter() - started, 'peak_gib': report.peak_bytes / 2**30,
                      'tokens': args.samples * args.length, 'layers': source.num_layers, 'device': report.device,
                      'bits': report.sizes.bits_per_weight, 'phases': times}), flush=True)  # fmt: skip


def config_of(args: argparse.Namespace) -> Path:
    """The shapes' config with fewer layers."""
    config = json.loads((FOLDER / f'{args.shapes}.json').read_text(encoding='utf-8'))
    if args.layers:
        config['num_hidden_layers'] = args.layers
    path = Path(f'{args.work}.config.json')
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config)
    if not path.exists() or path.read_text(encoding='utf-8') != text:
        path.write_text(text, encoding='utf-8')
    return path


def child(args: argparse.Namespace, work: Path) -> list[str]:
    return [sys.executable, __file__, '--run', '--shapes', args.shapes, '--layers', str(args.layers), '--recipe',
            args.recipe, '--samples', str(args.samples), '--length', str(args.length), '--batch', str(args.batch),
            '--device', args.device, '--work', str(work)]  # fmt: skip


def killed(args: argparse.Namespace, work: Path) -> None:
    """Start a run and kill it once ``--kill-after`` layers are in its manifest."""
    process = subprocess.Popen(child(args, work), stdout=subprocess.DEVNULL)
    manifest = work / '.lite' / 'manifest.json'
    while process.poll() is None:
        try:
            done = len(json.loads(manifest.read_text(encoding='utf-8'))['shards'])
        except (OSError, ValueError):
            done = 0
        if done > args.kill_after:
            time.sleep(0.3)  # into the next layer
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    process.wait()


def digests(work: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(work.glob('*.safetensors'))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', default='llama3-8b')
    parser.add_argument('--layers', type=int, default=0)
    parser.add_argument('--recipe', choices=tuple(RECIPES), default='gptq')
    parser.add_argument('--samples', type=int, default=128)
    parser.add_argument('--length', type=int, default=2048)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--device', default='auto')
    parser.add_argument('--kill-after', type=int, default=0, metavar='LAYERS')
    parser.add_argument('--work', type=Path, default=Path('quantised'))
    parser.add_argument('--out', type=Path, default=None)
    parser.add_argument('--run', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args)
        return 0
    whole = json.loads(subprocess.run(child(args, args.work), check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(json.dumps(whole, indent=2))
    if args.kill_after:
        second = args.work.with_name(args.work.name + '-killed')
        killed(args, second)
        subprocess.run(child(args, second), check=True, stdout=subprocess.DEVNULL)
        whole['equal_after_kill'] = digests(args.work) == digests(second)
        print('the killed run gives the same bytes:', whole['equal_after_kill'])
    if args.out is not None:
        args.out.write_text(json.dumps(whole | {'recipe': args.recipe, 'shapes': args.shapes}, indent=2) + '\n')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())

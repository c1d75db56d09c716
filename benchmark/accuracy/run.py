"""How much accuracy every way of quantising costs, measured so that it can be believed.

    python benchmark/accuracy/run.py prepare MODEL --out DIR [--seed 1] [--packages DIR]
    python benchmark/accuracy/run.py measure DIR [--variants a,b] [--device auto] [--samples 128] [--windows 1000]
    python benchmark/accuracy/run.py table DIR

``prepare`` writes one bfloat16 model with its channels and heads in a random order (see permute.py; its logits are
those of the original) and the token ids to calibrate with and to be judged by (texts.py). ``measure`` quantises it in
every way and compares each result with the model itself, window by window; it goes on where it was. Differences are
paired, with standard errors over windows of 2048 tokens; the model against itself gives exactly 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from evaluate import Results, compare, hidden, load, summarise  # noqa: E402
from permute import permute_layer, permute_top  # noqa: E402
from texts import HELD_OUT, Texts, make_texts  # noqa: E402

from lmdeploy.config.quantization import AWQ, GPTQ, INT, PACK, SMOOTH, Storage  # noqa: E402
from lmdeploy.hub.resolve import resolve  # noqa: E402
from lmdeploy.lite.driver import Driver, Event, Streams  # noqa: E402
from lmdeploy.lite.hidden import Hidden  # noqa: E402
from lmdeploy.lite.output import write_output  # noqa: E402
from lmdeploy.lite.recipe import LayerWeights, Recipe, TopWeights  # noqa: E402
from lmdeploy.lite.rotated import GPTQ as Rounded  # noqa: E402
from lmdeploy.lite.smooth import SmoothQuant  # noqa: E402
from lmdeploy.lite.source import Source, open_source  # noqa: E402
from lmdeploy.lite.workdir import WorkDir  # noqa: E402
from lmdeploy.runner.model_runner import choose_device  # noqa: E402
from lmdeploy.tokenizer import Tokenizer  # noqa: E402

LIMIT = 1e-3  # of a logit that changes by the permutation, next to the largest one


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the table.

    Attributes:
        make: the recipe; None: the model itself. cache: bits of keys and values. target: most increase of perplexity
            that is aimed at, mean of the languages; 0: none.
    """

    title: str
    make: Callable[[], Recipe] | None
    cache: int = 16
    target: float = 0.0
    of: str = ''  # another variant, whose folder it is


def packed(bits: int, group: int, symmetric: bool, activation: str = '') -> Storage:
    return Storage(PACK, bits=bits, group=group, symmetric=symmetric, activation=activation)


E4M3 = 'float8_e4m3fn'
AWQ4, GPTQ4 = Storage(AWQ, bits=4, group=128, symmetric=False), Storage(GPTQ, bits=4, group=128, zero_shift=1)
VARIANTS = {
    'control': Variant('the model itself', None),
    'w8a8': Variant('W8A8 int8', lambda: SmoothQuant(Storage(SMOOTH, activation='int8')), target=0.015),
    'fp8': Variant('W8A8 fp8', lambda: SmoothQuant(Storage(SMOOTH, E4M3, activation=E4M3), search=False), target=0.007),
    'w4-plain': Variant('W4 g128 asym, GPTQ only (awq file)', lambda: Rounded(AWQ4)),
    'w4-portable': Variant('W4 g128 asym, portable (awq file)', lambda: Rounded(AWQ4, 'portable'), target=0.04),
    'w4-native': Variant('W4 g128 asym, native', lambda: Rounded(packed(4, 128, False), 'native'), target=0.02),
    'w4-sym': Variant('W4 g128 sym, portable (gptq file)', lambda: Rounded(GPTQ4, 'portable'), target=0.05),
    'w4a8': Variant('W4A8 g128, native', lambda: Rounded(packed(4, 128, True, 'int8'), 'native'), target=0.06),
    'w3': Variant('W3 g128, native', lambda: Rounded(packed(3, 128, False), 'native'), target=0.15),
    'w2': Variant('W2 g64, native', lambda: Rounded(packed(2, 64, False), 'native')),
    'w8a8-gptq': Variant('W8A8 int8, GPTQ and Hadamard',
                         lambda: Rounded(Storage(INT, activation='int8'), 'native'), target=0.015),
    'w4-native-high': Variant('W4 g128 asym, native, effort high',
                              lambda: Rounded(packed(4, 128, False), 'native', 'high'), target=0.02),
    'kv8': Variant('KV cache int8', None, 8, 0.003),
    'kv4': Variant('KV cache int4', None, 4, 0.015),
    'w4a8-kv8': Variant('W4A8 g128, native, KV int8', None, 8, of='w4a8'),
    'w4a8-kv4': Variant('W4A8 g128, native, KV int4', None, 4, of='w4a8'),
}  # fmt: skip


def prepare(model: str, out: Path, seed: int, packages: Path, device: torch.device) -> None:
    path = resolve(model).path if not Path(model).exists() else Path(model)
    if not (out / 'texts' / 'calibration.npy').exists():
        tokenizer = Tokenizer(str(path))
        texts = make_texts(lambda text: tokenizer.encode_segments([(text, False)], add_bos=False), packages)
        texts.save(out / 'texts')
    folder = out / 'model'
    if (folder / 'config.json').exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    source = open_source(path)
    names, linears, norms = source.top_names(), source.linear_names(), source.norm_names()
    top = source.top(device)
    plain = Copies(source, top)
    permute_top(top, seed)
    tensors = {names['embedding']: top.embedding, names['norm']: top.norm}
    if not top.tied:
        tensors[names['head']] = top.head
    plain.start(top)
    for i in range(source.num_layers):
        layer = source.layer(i, device)
        plain.before(layer)
        permute_layer(layer, seed)
        plain.after(layer)
        at = source.layer_path(i)
        for role, linear in layer.linears.items():
            tensors[f'{at}.{linears[role]}.weight'] = linear.weight.bfloat16()
            if linear.bias is not None:
                tensors[f'{at}.{linears[role]}.bias'] = linear.bias.bfloat16()
        tensors |= {f'{at}.{name}.weight': layer.norms[role].bfloat16() for role, name in norms.items()}
    plain.check(top)
    save_file({k: v.bfloat16().cpu().contiguous() for k, v in tensors.items()}, folder / 'model.safetensors')
    config = {k: v for k, v in source.checkpoint.config.items() if v is not None} | {'torch_dtype': 'bfloat16'}
    (folder / 'config.json').write_text(json.dumps(config, indent=1))
    (out / 'prepared.json').write_text(json.dumps({'seed': seed, 'largest_difference': plain.difference}))
    print(f'prepared {folder}: logits differ by {plain.difference:.1e} of the largest', flush=True)


class Copies:
    """A few tokens through both models, side by side, in float32: the same logits."""

    def __init__(self, source: Source, top: TopWeights) -> None:
        from lmdeploy.lite.layer import Layers

        self.layers = Layers.of(source, top.embedding.device)
        self.eps = source.config.rms_norm_eps
        ids = torch.arange(100, 164, device=top.embedding.device) * 7
        self.ids, self.x = ids, top.embedding[ids][None]
        self.head, self.norm, self.difference = top.head, top.norm, 0.0

    def start(self, top: TopWeights) -> None:
        self.y = top.embedding[self.ids][None]

    def before(self, layer: LayerWeights) -> None:
        self.x = self.layers(layer, self.x)

    def after(self, layer: LayerWeights) -> None:
        self.y = self.layers(layer, self.y)

    def check(self, top: TopWeights) -> None:
        from lmdeploy.ops.norm import rms_norm

        def logits(x: Tensor, norm: Tensor, head: Tensor) -> Tensor:
            return rms_norm.reference(x[0], norm, self.eps) @ head.t()

        first, second = logits(self.x, self.norm, self.head), logits(self.y, top.norm, top.head)
        self.difference = float((first - second).abs().max() / first.abs().max())
        if not self.difference < LIMIT:
            raise SystemExit(f'the permuted model is another: logits differ by {self.difference:.1e}')


def quantise(folder: Path, out: Path, make: Callable[[], Recipe], calibration: np.ndarray,
             device: torch.device) -> None:  # fmt: skip
    """One variant, as the command line would do it."""
    source, recipe = open_source(folder), make()
    recipe.prepare(source.spec)
    key = json.dumps([recipe.key(), calibration.shape, int(calibration.sum())])
    work = WorkDir.open(out, key)
    sequences = [torch.from_numpy(row.astype(np.int64)) for row in calibration]
    width = source.config.hidden_size
    dtype = torch.float32 if device.type == 'cpu' else torch.bfloat16  # as the command line computes
    streams = Streams(*(Hidden(sequences, width, 8, device, out / f'{name}.bin', dtype)
                        for name in ('quantised', 'exact')[: 1 + ('cross' in recipe.needs)]))  # fmt: skip
    torch.backends.cuda.matmul.allow_tf32 = False
    phases = Phases(device)
    Driver(source, recipe, work, streams, device, phases).run()
    print(f'  {phases}', flush=True)
    write_output(source, recipe, work, None)
    work.close()
    source.checkpoint.close()


class Phases:
    """Where the time of a run goes: seconds by what the driver has begun."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.what, self.since = device, {}, 'start', time.perf_counter()

    def __call__(self, event: Event) -> None:
        if self.device.type != 'cpu':
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.what] = self.seconds.get(self.what, 0.0) + now - self.since
        self.what, self.since = f'{event.what} {event.site}'.strip(), now

    def __str__(self) -> str:
        most = sorted(self.seconds.items(), key=lambda entry: -entry[1])[:8]
        return ', '.join(f'{what} {seconds:.1f} s' for what, seconds in most)


def measure(root: Path, names: list[str], device: torch.device, samples: int, most: int, seconds: float) -> None:
    texts, results, began = Texts.load(root / 'texts'), Results(root / 'windows.jsonl'), time.perf_counter()
    model = load(root / 'model', device)
    print('loaded', round(time.perf_counter() - began, 1), flush=True)
    wanted = [(text, i) for i in range(most) for text in HELD_OUT if i < min(most, len(texts.held_out[text]))]
    exact: dict[tuple[str, int], Tensor] = {}
    for name in names:
        variant = VARIANTS[name]
        todo = [at for at in wanted if not results.done(name, *at)]
        if not todo:
            continue
        started = time.perf_counter()
        if started - began > seconds:
            print(f'{name}: no time left', flush=True)
            continue
        folder = root / 'variants' / (variant.of or name)
        if variant.make is not None and not (folder / 'config.json').exists():
            quantise(root / 'model', folder, variant.make, texts.calibration[:samples], device)
            took = round(time.perf_counter() - started, 1)
            with open(root / 'times.jsonl', 'a') as file:
                file.write(json.dumps([name, took]) + '\n')
            print(f'{name}: quantised in {took} s', flush=True)
        # products of 10-bit fractions where there are tensor cores: the same rounding on both sides, ten times as fast
        torch.backends.cuda.matmul.allow_tf32 = True
        other = load(folder, device) if variant.make is not None or variant.of else model
        for text, i in todo:
            ids = torch.from_numpy(texts.held_out[text][i].astype(np.int64))
            if (text, i) not in exact:
                exact[text, i] = hidden(model, ids[None])[0].cpu()
            found = hidden(other, ids[None], variant.cache)[0]
            results.add(name, compare(text, i, ids, exact[text, i].to(device), found, model.head, other.head))
        del other
        print(f'{name}: {time.perf_counter() - started:.1f} s; {row(name, results)}', flush=True)


def row(name: str, results: Results) -> str:
    """One line of the table: increases of the perplexity by language, with standard errors."""
    windows = results.of(name)
    parts, increases = [], []
    for language in ('en', 'zh', 'code'):
        own = [w for w in windows if HELD_OUT[w.text][0] == language]
        if own:
            found = summarise(own)
            increases.append(found.increase)
            parts.append(f'{language} {100 * found.increase:+.2f} ± {100 * found.increase_error:.2f} % '
                         f'(KL {found.kl:.4f}, top-1 {100 * found.agreement:.1f} %, {found.tokens} tokens)')
    mean = sum(increases) / max(len(increases), 1)
    target = VARIANTS[name].target
    verdict = f'; aim {100 * target:.1f} %: {"reached" if mean <= target else "missed"}' if target else ''
    return f'{VARIANTS[name].title}: mean {100 * mean:+.2f} %{verdict}; ' + '; '.join(parts)


def summary(root: Path) -> dict[str, object]:
    """Everything, for a file."""
    results, texts = Results(root / 'windows.jsonl'), Texts.load(root / 'texts')
    prepared, times = root / 'prepared.json', root / 'times.jsonl'
    return {
        'texts': texts.digests(),
        'prepared': json.loads(prepared.read_text()) if prepared.exists() else {},
        'seconds': dict(map(json.loads, times.read_text().splitlines())) if times.exists() else {},
        'variants': {name: {language: asdict(summarise(own)) for language in ('en', 'zh', 'code')
                            if (own := [w for w in results.of(name) if HELD_OUT[w.text][0] == language])}
                     for name in results.variants()}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['prepare', 'measure', 'table'])
    parser.add_argument('where', help='prepare: a model; else the folder that prepare made')
    parser.add_argument('--out', type=Path, help='of prepare')
    parser.add_argument('--packages', type=Path, default=Path('packages'), help='downloaded archives')
    parser.add_argument('--seed', type=int, default=1, help='of the permutation')
    parser.add_argument('--variants', default=','.join(VARIANTS))
    parser.add_argument('--device', default='auto')
    parser.add_argument('--samples', type=int, default=128, help='calibration windows')
    parser.add_argument('--windows', type=int, default=1000, help='at most so many of each text')
    parser.add_argument('--seconds', type=float, default=1e9, help='no variant begins after that')
    args = parser.parse_args()
    device = choose_device(args.device)
    if args.what == 'prepare':
        with torch.no_grad():
            prepare(args.where, args.out, args.seed, args.packages, device)
    elif args.what == 'measure':
        measure(Path(args.where), args.variants.split(','), device, args.samples, args.windows, args.seconds)
    if args.what != 'prepare':
        root = Path(args.where)
        results = Results(root / 'windows.jsonl')
        print('\n'.join(row(name, results) for name in results.variants()))
        (root / 'accuracy.json').write_text(json.dumps(summary(root), indent=1))


if __name__ == '__main__':
    main()

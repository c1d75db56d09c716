"""Speed of the CPU engine beside transformers' generate, by ratio, in one process.

    python benchmark/compare_transformers.py [MODEL.gguf | alias] [--rounds 5] [--threads 2]

Both sides load the same file in the same dtype, with its weights dequantised as transformers does, and use the same
number of threads; every round runs both, alternating, and the figure is the median of the rounds' ratios, since the
speed of shared machines swings from minute to minute. transformers runs with a static cache, its setting for speed.
Each side is alone when it is timed: whoever computes in a process keeps a team of OpenMP threads, and two teams on the
same processors slow each other down, so transformers runs in a thread that ends, and the pipeline is built anew for
every round. Reported: single-stream decode, prefill of 512 tokens, and how many times the tokens per second of one
stream 16 concurrent prompts give.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from lmdeploy import GenerationConfig, Pipeline, PytorchEngineConfig, pipeline
from lmdeploy.hub.resolve import resolve

DTYPES = {'bfloat16': torch.bfloat16, 'float32': torch.float32}
REPEATS = 2  # timings of a kind in a round; the better one counts
T = TypeVar('T')


def timed(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def apart(run: Callable[[], T]) -> T:
    """``run()`` in a thread that ends, and its OpenMP team with it."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def load_transformers(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    place: dict[str, Any] = {'gguf_file': path.name} if path.is_file() else {}
    model = AutoModelForCausalLM.from_pretrained(path.parent if path.is_file() else path, dtype=dtype, **place)
    return model.eval()


def generate(model: Any, ids: list[list[int]], new: int) -> None:
    with torch.inference_mode():
        model.generate(torch.tensor(ids), attention_mask=torch.ones(len(ids), len(ids[0]), dtype=torch.long),
                       max_new_tokens=new, min_new_tokens=new, do_sample=False, cache_implementation='static',
                       pad_token_id=0, disable_compile=True)


def answer(pipe: Pipeline, ids: list[list[int]], new: int) -> None:
    answers = pipe(ids, gen_config=GenerationConfig(max_new_tokens=new, ignore_eos=True))
    assert all(a.generate_token_len == new for a in answers), [a.error_message for a in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('model', nargs='?', default='qwen2.5-coder:0.5b')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--dtype', choices=DTYPES, default='bfloat16')
    parser.add_argument('--new', type=int, default=64, help='tokens per answer')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = resolve(args.model).path
    generator = torch.Generator().manual_seed(0)

    def prompt(length: int) -> list[int]:
        return torch.randint(1000, 20000, (length,), generator=generator).tolist()

    peer = apart(lambda: load_transformers(path, DTYPES[args.dtype]))
    short, long, many = prompt(32), prompt(512), [prompt(32) for _ in range(16)]

    def ours() -> dict[str, float]:
        config = PytorchEngineConfig(dtype=args.dtype, session_len=2048, max_batch_size=16, exact_weights=True)
        with pipeline(str(path), config, log_level='ERROR') as pipe:
            answer(pipe, [long], 4)
            return {
                'short': timed(lambda: answer(pipe, [short], 1)),
                'long': timed(lambda: answer(pipe, [long], 1)),
                'whole': timed(lambda: answer(pipe, [short], args.new)),
                'many': timed(lambda: answer(pipe, many, args.new)),
            }

    def theirs() -> dict[str, float]:
        torch.set_num_threads(args.threads)
        generate(peer, [long], 4)
        return {
            'short': timed(lambda: generate(peer, [short], 1)),
            'long': timed(lambda: generate(peer, [long], 1)),
            'whole': timed(lambda: generate(peer, [short], args.new)),
        }

    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        us, them = ours(), apart(theirs)
        decode, decode_peer = (side['whole'] - side['short'] for side in (us, them))
        rounds.append({
            'decode tok/s': (args.new - 1) / decode,
            'decode tok/s, transformers': (args.new - 1) / decode_peer,
            'decode ratio': decode_peer / decode,
            'prefill tok/s': len(long) / us['long'],
            'prefill tok/s, transformers': len(long) / them['long'],
            'prefill ratio': them['long'] / us['long'],
            '16 streams tok/s': 16 * args.new / us['many'],
            '16 streams / 1 stream': 16 * us['whole'] / us['many'],
        })
    figures = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    print(json.dumps({'model': args.model, 'dtype': args.dtype, 'threads': args.threads, 'rounds': args.rounds,
                      **{name: round(value, 2) for name, value in figures.items()}}, indent=2))


if __name__ == '__main__':
    main()

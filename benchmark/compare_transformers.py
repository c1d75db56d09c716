"""Speed of the CPU engine beside transformers' generate, by ratio, in one process.

    python benchmark/compare_transformers.py [MODEL.gguf | alias] [--rounds 5] [--threads 2]

Both sides load the same file in the same dtype and use the same threads; every round runs both, alternating, and the
figure is the median of the rounds' ratios, since the speed of shared machines swings from minute to minute.
transformers runs with a static cache, its setting for speed. Reported: single-stream decode, prefill of 512 tokens,
and how many times the tokens per second of one stream 16 concurrent prompts give.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lmdeploy import GenerationConfig, Pipeline, PytorchEngineConfig, pipeline
from lmdeploy.hub.resolve import resolve

PAUSE = 0.5  # seconds before each timing: OpenMP threads of the other side's last product spin on for a while
DTYPES = {'bfloat16': torch.bfloat16, 'float32': torch.float32}


def timed(run: Callable[[], Any]) -> float:
    time.sleep(PAUSE)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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

    pipe = pipeline(str(path), PytorchEngineConfig(dtype=args.dtype, session_len=2048, max_batch_size=16),
                    log_level='ERROR')
    peer = load_transformers(path, DTYPES[args.dtype])
    short, long, many = prompt(32), prompt(512), [prompt(32) for _ in range(16)]
    answer(pipe, [short], 4)
    generate(peer, [short], 4)

    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        ours, theirs = {}, {}
        for name, ids in (('short', short), ('long', long)):
            ours[name] = timed(lambda ids=ids: answer(pipe, [ids], 1))
            theirs[name] = timed(lambda ids=ids: generate(peer, [ids], 1))
        decode = timed(lambda: answer(pipe, [short], args.new)) - ours['short']
        decode_peer = timed(lambda: generate(peer, [short], args.new)) - theirs['short']
        batch = timed(lambda: answer(pipe, many, args.new))
        alone = decode + ours['short']
        rounds.append({
            'decode tok/s': (args.new - 1) / decode,
            'decode tok/s, transformers': (args.new - 1) / decode_peer,
            'decode ratio': decode_peer / decode,
            'prefill tok/s': len(long) / ours['long'],
            'prefill tok/s, transformers': len(long) / theirs['long'],
            'prefill ratio': theirs['long'] / ours['long'],
            '16 streams tok/s': 16 * args.new / batch,
            '16 streams / 1 stream': 16 * alone / batch,
        })
    pipe.close()
    figures = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    print(json.dumps({'model': args.model, 'dtype': args.dtype, 'threads': args.threads, 'rounds': args.rounds,
                      **{name: round(value, 2) for name, value in figures.items()}}, indent=2))


if __name__ == '__main__':
    main()

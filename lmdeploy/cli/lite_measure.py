"""``python -m lmdeploy.cli.lite_measure MODEL IDS``: one model measured in a process of its own, for ``lite compare``.

Loads it as a pipeline, takes the loss of held-out tokens and the pace of one answer, and prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

PROMPT, ANSWER = 64, 64  # tokens


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('model')
    parser.add_argument('ids', type=Path, help='a JSON file: a list of lists of token ids')
    parser.add_argument('--quant-policy', type=int, default=0)
    parser.add_argument('--device', default='auto')
    parser.add_argument('--exact', action='store_true', help='a GGUF file in 16 bits')
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args(argv)

    from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
    from lmdeploy.lite.job import choose_device, peak_bytes

    windows = json.loads(args.ids.read_text(encoding='utf-8'))
    longest = max(PROMPT + ANSWER, *map(len, windows)) + 16
    device = choose_device(args.device)
    config = PytorchEngineConfig(quant_policy=args.quant_policy, device_type=device.type, session_len=longest,
                                 exact_weights=args.exact, max_batch_size=4,
                                 cache_max_entry_count=4 * (longest // 64 + 2))  # fmt: skip
    with pipeline(args.model, config, log_level='ERROR') as pipe:
        losses = pipe.get_ppl(windows)
        settings = GenerationConfig(max_new_tokens=ANSWER, min_new_tokens=ANSWER, ignore_eos=True, temperature=0.0)
        paces = []
        for _ in range(args.rounds):
            first = last = time.perf_counter()
            count = 0
            for piece in pipe.stream_infer([windows[0][:PROMPT]], settings):
                if piece.token_ids:
                    last = time.perf_counter()
                    first = last if not count else first
                    count += len(piece.token_ids)
            paces.append((count - 1) / (last - first))
        chosen = {name: str(value) for name, value in pipe.frontend.capacity.choices.items()}
        pace = sorted(paces)[len(paces) // 2]
        print(json.dumps({'losses': losses, 'tokens_per_second': pace, 'peak_bytes': peak_bytes(device),
                          'choices': chosen}))  # fmt: skip
    return 0


if __name__ == '__main__':
    raise SystemExit(main(sys.argv[1:]))

"""Print an answer while it is generated, and measure it."""

import sys
import time

from lmdeploy import GenerationConfig, pipeline

model = sys.argv[1] if len(sys.argv) > 1 else 'smollm2:135m'
gen_config = GenerationConfig(max_new_tokens=64, do_sample=True, temperature=0.6, top_p=0.9)

with pipeline(model) as pipe:
    start = time.perf_counter()
    for piece in pipe.stream_infer('Give three suggestions about time management.', gen_config=gen_config):
        print(piece.text, end='', flush=True)
    seconds = time.perf_counter() - start
    print(f'\n{piece.generate_token_len} tokens in {seconds:.1f} s, ended by {piece.finish_reason}')

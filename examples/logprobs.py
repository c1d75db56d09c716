"""How sure was the model of each token?"""

import math
import sys

from lmdeploy import GenerationConfig, pipeline

model = sys.argv[1] if len(sys.argv) > 1 else 'smollm2:135m'
with pipeline(model) as pipe:
    answer = pipe('What is the capital of France?', gen_config=GenerationConfig(max_new_tokens=16, logprobs=3))
    for token, best in zip(answer.token_ids, answer.logprobs):
        row = ', '.join(f'{pipe.tokenizer.decode([t])!r} {math.exp(logprob):.0%}' for t, logprob in best.items())
        print(f'{pipe.tokenizer.decode([token])!r:12} from {row}')

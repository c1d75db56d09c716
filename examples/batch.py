"""Answer several prompts in one call: they are batched in the engine."""

import sys

import lmdeploy
from lmdeploy import GenerationConfig

model = sys.argv[1] if len(sys.argv) > 1 else 'smollm2:135m'
pipe = lmdeploy.pipeline(model)
responses = pipe(prompts=['Hi, pls intro yourself', 'Shanghai is'],
                 gen_config=GenerationConfig(max_new_tokens=64, top_p=0.8, top_k=40, temperature=0.6))
for response in responses:
    print(response)

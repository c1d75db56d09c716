"""A conversation of two turns, in the two ways that there are: a session, and messages of one's own."""

import sys

from lmdeploy import GenerationConfig, TurbomindEngineConfig, pipeline

model = sys.argv[1] if len(sys.argv) > 1 else 'smollm2:135m'
gen_config = GenerationConfig(max_new_tokens=32, top_k=40, top_p=0.8, temperature=0.6)
pipe = pipeline(model, backend_config=TurbomindEngineConfig(session_len=4096, enable_prefix_caching=True))

# A session remembers what was said.
sess = pipe.chat('My favourite city is Shanghai. Tell me about it.', gen_config=gen_config)
print(sess.response.text)
sess = pipe.chat('Which city is my favourite?', session=sess, gen_config=gen_config)
print(sess.response.text)

# With messages, the caller does.
messages = [{'role': 'user', 'content': 'My favourite city is Shanghai. Tell me about it.'}]
answer = pipe(messages, gen_config=gen_config)
messages += [{'role': 'assistant', 'content': answer.text},
             {'role': 'user', 'content': 'Which city is my favourite?'}]
print(pipe(messages, gen_config=gen_config).text)
pipe.close()

"""An answer as data: JSON by a schema, and a text by a regular expression. Needs `pip install llguidance`."""

import json
import sys

from lmdeploy import GenerationConfig, pipeline

person = {
    'type': 'object',
    'properties': {'name': {'type': 'string', 'maxLength': 20}, 'age': {'type': 'integer', 'minimum': 0}},
    'required': ['name', 'age'],
    'additionalProperties': False,
}
by_schema = GenerationConfig(max_new_tokens=128, response_format={
    'type': 'json_schema', 'json_schema': {'name': 'person', 'schema': person}})
by_regex = GenerationConfig(response_format={'type': 'regex_schema', 'regex_schema': '(positive|negative|neutral)'})

model = sys.argv[1] if len(sys.argv) > 1 else 'smollm2:135m'
with pipeline(model) as pipe:
    prompts = ['Describe Ada, who is 36, as JSON.', 'Sentiment of "I love this phone":']
    described, sentiment = answers = pipe(prompts, gen_config=[by_schema, by_regex])
    for answer in answers:
        if answer.finish_reason == 'error':
            sys.exit(answer.error_message)
    print(json.loads(described.text))
    print(sentiment.text)

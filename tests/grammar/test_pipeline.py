"""response_format through the whole pipeline, on a model of random weights: only the grammar makes sense of it."""

from __future__ import annotations

import datetime
import json
import re

import pytest

from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
from lmdeploy.errors import RequestError
from tests.grammar.schemas import DIGIT, SCHEMAS, WORD, closed
from tests.toy import write_model

jsonschema = pytest.importorskip('jsonschema')
pytest.importorskip('llguidance')

CONFIG = PytorchEngineConfig(dtype='float32', session_len=512, max_batch_size=16, device_type='cpu')


@pytest.fixture(scope='module')
def pipe(tmp_path_factory):
    with pipeline(str(write_model(tmp_path_factory.mktemp('model') / 'toy')), CONFIG) as built:
        yield built


def gen(schema=None, **options):
    form = options.pop('response_format', None) or {'type': 'json_schema', 'json_schema': {'name': 'it',
    'schema': schema}}
    return GenerationConfig(**{'max_new_tokens': 200, 'response_format': form} | options)


PERSON = SCHEMAS['person']


def test_finished_answers_of_every_schema_validate(pipe):
    """All schemas in one batch, each sampled twice with its own seeds."""
    prompts, configs = [], []
    for schema in SCHEMAS.values():
        for seed in range(2):
            prompts.append('hello')
            configs.append(gen(schema, do_sample=True, temperature=2.0, top_k=0, random_seed=seed))
    responses = pipe(prompts, configs)
    finished = 0
    for i, response in enumerate(responses):
        assert response.finish_reason in ('stop', 'length'), response.error_message
        if response.finish_reason == 'stop':
            finished += 1
            jsonschema.validate(json.loads(response.text), list(SCHEMAS.values())[i // 2])
    assert finished > len(responses) // 2


def test_several_answers_have_a_matcher_each(pipe):
    responses = pipe(['hello'], gen(PERSON, n=8, do_sample=True, temperature=2.0, top_k=0, random_seed=3))
    assert len(responses) == 8
    done = [response.text for response in responses if response.finish_reason == 'stop']
    assert len(set(done)) > 1
    for text in done:
        jsonschema.validate(json.loads(text), PERSON)


def test_streamed_pieces_join_to_the_same_answer(pipe):
    config = gen(PERSON, do_sample=True, temperature=2.0, top_k=0, random_seed=1)
    whole = pipe('hello', config)
    pieces = list(pipe.stream_infer('hello', config))
    assert ''.join(piece.text for piece in pieces) == whole.text
    assert pieces[-1].finish_reason == whole.finish_reason == 'stop'
    jsonschema.validate(json.loads(whole.text), PERSON)


def test_requests_with_and_without_a_grammar_share_a_batch(pipe):
    free = GenerationConfig(max_new_tokens=20)
    alone = [pipe('one', free).text, pipe('two', gen(PERSON)).text, pipe('three', free).text]
    together = pipe(['one', 'two', 'three'], [free, gen(PERSON), free])
    assert [response.text for response in together] == alone


def test_a_regular_expression_is_matched_as_a_whole(pipe):
    form = {'type': 'regex_schema', 'regex_schema': r'(\d{1,3}\.){3}\d{1,3}'}
    for response in pipe(['one', 'two', 'three'], gen(response_format=form)):
        assert response.finish_reason == 'stop'
        assert re.fullmatch(form['regex_schema'], response.text)


def test_stop_words_cut_the_answer_where_they_stand(pipe):
    config = gen(closed(a=DIGIT, b=DIGIT), stop_words=['"b"'])
    response = pipe('hello', config)
    assert response.finish_reason == 'stop'
    assert re.fullmatch(r'\{\s*"a"\s*:\s*\d\s*,\s*', response.text)


def test_penalties_and_biases_act_within_the_grammar(pipe):
    response = pipe('hello', gen(PERSON, repetition_penalty=1.3, frequency_penalty=1.0, logprobs=2,
                                 logit_bias={i: -50.0 for i in range(100)}))
    if response.finish_reason == 'stop':
        jsonschema.validate(json.loads(response.text), PERSON)
    assert len(response.logprobs) == len(response.token_ids)


def test_bans_that_leave_nothing_end_that_request_alone(pipe):
    responses = pipe(['one', 'two'], [gen(closed(a=DIGIT), bad_words=['{']), gen(closed(a=DIGIT))])
    assert [response.finish_reason for response in responses] == ['error', 'stop']
    assert responses[0].error_code == 'LMD-335'


@pytest.mark.parametrize('form, code', [
    ({'type': 'xml'}, 'LMD-320'),
    ({'type': 'json_schema', 'json_schema': {'schema': {'not': {}}}}, 'LMD-322'),
    ({'type': 'json_schema', 'json_schema': {'schema': {'enum': []}}}, 'LMD-323'),
    ({'type': 'regex_schema', 'regex_schema': '(?=a)'}, 'LMD-324'),
])
def test_a_form_that_cannot_be_honoured_is_refused_at_once(pipe, form, code):
    with pytest.raises(RequestError) as caught:
        pipe('hello', GenerationConfig(response_format=form))
    assert caught.value.code == code


def test_a_grammar_that_does_not_compile_is_an_error_of_its_request(pipe):
    bad = {'type': 'string', 'pattern': 'a.*b.*c', 'minLength': 100, 'maxLength': 10000}
    responses = pipe(['one', 'two'], [gen(bad), gen(WORD)])
    assert responses[0].finish_reason == 'error'
    assert responses[0].error_code == 'LMD-325'
    assert responses[1].finish_reason in ('stop', 'length')


def test_ignore_eos_contradicts_a_grammar(pipe):
    with pytest.raises(RequestError) as caught:
        pipe('hello', gen(PERSON, ignore_eos=True))
    assert caught.value.code == 'LMD-328'


@pytest.mark.real
def test_a_real_model_describes_a_person(qwen_coder):
    schema = {'type': 'object', 'required': ['name', 'age', 'skills'], 'additionalProperties': False, 'properties': {
        'name': {'type': 'string', 'maxLength': 40}, 'age': {'type': 'integer', 'minimum': 0, 'maximum': 120},
        'skills': {'type': 'array', 'items': {'type': 'string', 'maxLength': 20}, 'minItems': 3, 'maxItems': 5}}}
    with pipeline(str(qwen_coder), PytorchEngineConfig(session_len=512, max_batch_size=4)) as pipe:
        english, chinese, date = pipe(
            ['Describe Ada, a programmer of 36 years, as JSON.', '用 JSON 描述李雷,一名 36 岁的程序员。',
            'When did Apollo 11 land?'],
            [gen(schema), gen(schema), gen({'type': 'string', 'format': 'date'})])
    for response in (english, chinese):
        assert response.finish_reason == 'stop'
        person = json.loads(response.text)
        jsonschema.validate(person, schema)
        assert person['age'] == 36
    assert 'Ada' in english.text
    assert '李雷' in chinese.text
    datetime.date.fromisoformat(json.loads(date.text))

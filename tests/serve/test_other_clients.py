"""The official clients of Anthropic's messages and of OpenAI's responses, over TCP."""

from __future__ import annotations

import asyncio
import json

import anthropic
import openai
import pytest

from lmdeploy.serve.auth import KeyRing
from tests.serve.fake_server import MODEL
from tests.serve.live import live
from tests.serve.test_anthropic import TOOL as CLAUDE_TOOL
from tests.serve.test_responses import TOOL
from tests.serve.test_tools import CALL, say

MESSAGES = [{'role': 'user', 'content': 'provide three suggestions about time management'}]
ASK = {'model': MODEL, 'max_tokens': 20, 'messages': MESSAGES}


@pytest.fixture
def keyed(serve):
    server = serve(keys=KeyRing(['token']), check_host=True, tool_parser='qwen', reasoning_parser='default',
                   session_len=1024, num_blocks=256)
    with live(server) as running:
        yield server, running


def claude(running, key='token', kind=anthropic.Anthropic, **options):
    return kind(api_key=key, base_url=running.url, timeout=20, max_retries=0, **options)


def openai_client(running, key='token'):
    return openai.OpenAI(api_key=key, base_url=f'{running.url}/v1', timeout=20, max_retries=0)


def test_anthropic_answers_streams_and_counts_alike(keyed):
    server, running = keyed
    api = claude(running)
    assert api.models.list().data[0].id == MODEL
    whole = api.messages.create(**ASK)
    assert whole.role == 'assistant' and whole.stop_reason == 'max_tokens' and whole.usage.output_tokens == 20
    with api.messages.stream(**ASK) as stream:
        text = ''.join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)
    kinds = [event.type for event in api.messages.create(**ASK, stream=True)]
    assert kinds[:2] == ['message_start', 'content_block_start'] and kinds[-1] == 'message_stop'
    counted = api.messages.count_tokens(model=MODEL, messages=MESSAGES)
    assert counted.input_tokens == whole.usage.input_tokens
    bearer = claude(running, None, auth_token='token').messages.create(**ASK)
    assert bearer.content[0].text == text and server.settled()


def test_anthropic_asynchronously(keyed):
    _, running = keyed

    async def main():
        async with claude(running, kind=anthropic.AsyncAnthropic) as api:
            async with api.messages.stream(**ASK) as stream:
                text = ''.join([piece async for piece in stream.text_stream])
            answers = await asyncio.gather(*(api.messages.create(**ASK) for _ in range(6)))
            assert {answer.content[0].text for answer in answers} == {text}

    asyncio.run(main())


@pytest.mark.parametrize('stream', [False, True])
def test_anthropic_thinks_calls_and_reads_the_result(keyed, stream):
    server, running = keyed
    api = claude(running)

    def ask(messages):
        body = {'model': MODEL, 'max_tokens': 200, 'messages': messages, 'tools': [CLAUDE_TOOL],
                'thinking': {'type': 'enabled', 'budget_tokens': 100}}
        if not stream:
            return api.messages.create(**body)
        with api.messages.stream(**body) as pieces:
            return pieces.get_final_message()

    say(server, f'<think>hm</think>I will.{CALL}')
    message = ask(MESSAGES)
    thought, said, call = message.content
    assert (thought.thinking, said.text, call.name, call.input) == ('hm', 'I will.', 'set_light', {'on': True})
    assert message.stop_reason == 'tool_use'
    say(server, 'It is on.')
    result = {'role': 'user', 'content': [{'type': 'tool_result', 'tool_use_id': call.id, 'content': 'done'}]}
    message = ask([*MESSAGES, {'role': 'assistant', 'content': message.content}, result])
    assert message.content[0].text == 'It is on.' and message.stop_reason == 'end_turn'


@pytest.mark.parametrize(('call', 'error', 'kind'), [
    (lambda api: api.with_options(api_key='wrong').messages.create(**ASK), anthropic.AuthenticationError,
     'authentication_error'),
    (lambda api: api.messages.create(**ASK | {'model': 'x'}), anthropic.NotFoundError, 'not_found_error'),
    (lambda api: api.messages.create(**ASK | {'max_tokens': 0}), anthropic.BadRequestError, 'invalid_request_error'),
    (lambda api: api.messages.create(**ASK | {'max_tokens': 0}, stream=True), anthropic.BadRequestError,
     'invalid_request_error'),
    (lambda api: api.messages.count_tokens(model='x', messages=MESSAGES), anthropic.NotFoundError, 'not_found_error'),
])
def test_anthropic_raises_its_own_errors(keyed, call, error, kind):
    with pytest.raises(error) as caught:
        call(claude(keyed[1]))
    assert caught.value.body['error']['type'] == kind


def test_a_stream_of_anthropic_s_that_breaks_raises(serve):
    with live(serve(fail_at=5)) as running:
        with pytest.raises(anthropic.APIStatusError, match='LMD-519'):
            list(claude(running, 'none').messages.create(**ASK, stream=True))


def test_responses_answer_stream_and_go_on(keyed):
    server, running = keyed
    api = openai_client(running)
    whole = api.responses.create(model=MODEL, input='hello', max_output_tokens=20, instructions='be brief')
    assert whole.status == 'incomplete' and whole.incomplete_details.reason == 'max_output_tokens'
    with api.responses.stream(model=MODEL, input='hello', max_output_tokens=20, instructions='be brief') as stream:
        text = ''.join(event.delta for event in stream if event.type == 'response.output_text.delta')
    assert text == whole.output_text and whole.usage.output_tokens == 20
    kinds = [event.type for event in api.responses.create(model=MODEL, input='hello', max_output_tokens=5, stream=True)]
    assert kinds[:4] == ['response.created', 'response.in_progress', 'response.output_item.added',
                         'response.content_part.added']
    assert kinds[-4:] == ['response.output_text.done', 'response.content_part.done', 'response.output_item.done',
                          'response.incomplete']
    more = api.responses.create(model=MODEL, input='and?', max_output_tokens=5, previous_response_id=whole.id)
    assert more.previous_response_id == whole.id and more.usage.input_tokens > whole.usage.input_tokens
    assert api.responses.retrieve(whole.id).output_text == text
    api.responses.delete(whole.id)
    with pytest.raises(openai.NotFoundError) as caught:
        api.responses.retrieve(whole.id)
    assert caught.value.code == 'response_not_found' and server.settled()


@pytest.mark.parametrize('stream', [False, True])
def test_responses_think_call_and_read_the_result(keyed, stream):
    server, running = keyed
    api = openai_client(running)

    def ask(items, **more):
        if not stream:
            return api.responses.create(model=MODEL, input=items, tools=[TOOL], **more)
        with api.responses.stream(model=MODEL, input=items, tools=[TOOL], **more) as pieces:
            return pieces.get_final_response()

    say(server, f'<think>hm</think>I will.{CALL}')
    response = ask('light!')
    thought, said, call = response.output
    assert (thought.content[0].text, said.content[0].text, call.name) == ('hm', 'I will.', 'set_light')
    assert json.loads(call.arguments) == {'on': True} and response.status == 'completed'
    say(server, 'It is on.')
    result = {'type': 'function_call_output', 'call_id': call.call_id, 'output': 'done'}
    assert ask([result], previous_response_id=response.id).output_text == 'It is on.'
    items = [{'role': 'user', 'content': 'light!'}, *(item.to_dict() for item in response.output), result]
    assert ask(items, store=False).output_text == 'It is on.'


def test_responses_have_a_form(keyed):
    pytest.importorskip('llguidance')
    from pydantic import BaseModel

    class Light(BaseModel):
        on: bool

    parsed = openai_client(keyed[1]).responses.parse(model=MODEL, input='light?', text_format=Light,
                                                     max_output_tokens=200)
    assert parsed.status != 'completed' or isinstance(parsed.output_parsed, Light)


@pytest.mark.parametrize(('call', 'error'), [
    (lambda api: api.with_options(api_key='wrong').responses.retrieve('x'), openai.AuthenticationError),
    (lambda api: api.responses.create(model='x', input='x'), openai.NotFoundError),
    (lambda api: api.responses.create(model=MODEL, input='x', background=True), openai.BadRequestError),
    (lambda api: api.responses.create(model=MODEL, input=[], stream=True), openai.BadRequestError),
])
def test_responses_raise_openai_s_errors(keyed, call, error):
    with pytest.raises(error) as caught:
        call(openai_client(keyed[1]))
    assert caught.value.code and caught.value.body['message']

"""Answers as blocks: what a client puts together from a stream, in either form, is the whole answer."""

from __future__ import annotations

import itertools
import json

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.frontend.frontend import RequestOutput
from lmdeploy.serve.anthropic.events import content_of, step_event
from lmdeploy.serve.anthropic.partial import partial_object
from lmdeploy.serve.blocks import BlockReader, Blocks
from lmdeploy.serve.generation import Usage
from lmdeploy.serve.openai.responses_events import ResponseEvents, finish_response, new_response, output_item
from lmdeploy.serve.openai.responses_protocol import ResponsesRequest
from lmdeploy.serve.parsers import AnswerParser, reasoning_parser, tool_parser
from tests.serve.fake_server import named_events

PIECES = st.sampled_from(['<think>', '</think>', 'hm', ' ', '\n', '<tool_call>\n', '{"name": "f", "arguments": {',
                          '"a": 1', ', "b": ["x', '\\"', '"]', '}}', '\n</tool_call>', 'text', '你', '<', '"'])


def reader(most_calls=None):
    numbers = itertools.count()
    parser = AnswerParser(reasoning_parser('default'), tool_parser('qwen', names={'f'}), most_calls)
    return BlockReader(parser, Blocks(lambda kind: f'{kind}_{next(numbers)}'))


def outputs(text, cuts, finish):
    """The text in pieces, the last of which ends the answer."""
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in zip(places, places[1:])] or ['']
    return [RequestOutput(piece, [0], 1, i + 1, finish_reason=finish if i == len(pieces) - 1 else None)
            for i, piece in enumerate(pieces)]


def read(text, cuts, finish, most_calls=None):
    """The reader of a whole answer, and the steps that it took."""
    one = reader(most_calls)
    return one, [step for output in outputs(text, cuts, finish) for step in one.take(output, Usage())]


def anthropic_client(data):
    """The content that a client has at the end; of calls the JSON text."""
    content = []
    for event in data:
        if event['type'] == 'content_block_start':
            assert event['index'] == len(content)
            content.append(dict(event['content_block']))
            if 'input' in content[-1]:
                assert content[-1]['input'] == {}
                content[-1]['input'] = ''
        elif event['type'] == 'content_block_delta':
            key = {'text_delta': 'text', 'thinking_delta': 'thinking', 'input_json_delta': 'partial_json'}
            name = key[event['delta']['type']]
            content[event['index']]['input' if name == 'partial_json' else name] += event['delta'][name]
        else:
            assert event == {'type': 'content_block_stop', 'index': len(content) - 1}
    return content


def openai_client(data):
    """The output that a client has at the end, put together from deltas alone."""
    output = []
    for event in data:
        kind = event['type'].removeprefix('response.')
        if kind == 'output_item.added':
            assert event['output_index'] == len(output) and event['item']['status'] == 'in_progress'
            output.append(event['item'])
            continue
        item = output[event['output_index']]
        if kind == 'content_part.added':
            item['content'].append(event['part'])
        elif kind in ('output_text.delta', 'reasoning_text.delta'):
            item['content'][event['content_index']]['text'] += event['delta']
        elif kind == 'function_call_arguments.delta':
            item['arguments'] += event['delta']
        elif kind == 'function_call_arguments.done':
            assert (event['arguments'], event['name']) == (item['arguments'], item['name'])
        elif kind in ('output_text.done', 'reasoning_text.done'):
            assert event['text'] == item['content'][0]['text']
        elif kind == 'content_part.done':
            assert event['part'] == item['content'][0]
        else:
            assert kind == 'output_item.done' and event['item'] == item | {'status': event['item']['status']}
            item['status'] = event['item']['status']
    return output


@given(st.lists(PIECES, max_size=14).map(''.join), st.lists(st.integers(0, 120), max_size=20),
       st.sampled_from(['stop', 'length']), st.sampled_from([None, 1]))
def test_a_stream_is_the_whole_in_pieces(text, cuts, finish, most_calls):
    whole, _ = read(text, (), finish, most_calls)
    cut, steps = read(text, cuts, finish, most_calls)
    plain = [(b.kind, b.id, b.name, b.text, b.complete) for b in whole.blocks.all]
    assert [(b.kind, b.id, b.name, b.text, b.complete) for b in cut.blocks.all] == plain
    assert plain and (most_calls is None or whole.blocks.calls <= 1)

    told = json.loads(msgspec.json.encode(content_of(whole.blocks.all)))
    heard = anthropic_client(named_events(b''.join(map(step_event, steps)).decode()))
    for block in heard:
        if 'input' in block:
            block['input'] = partial_object(block['input'])
    assert heard == told

    events = ResponseEvents(new_response('resp_1', ResponsesRequest(model='m', input='x')))
    streamed = named_events(b''.join(map(events.step, steps)).decode())
    assert [event['sequence_number'] for event in streamed] == list(range(len(streamed)))
    assert openai_client(streamed) == json.loads(msgspec.json.encode([output_item(b) for b in whole.blocks.all]))


def test_what_was_cut_off_is_incomplete():
    for text, finish, complete in (('one', 'stop', [True]), ('one', 'length', [False]),
                                   ('<think>a</think>b', 'length', [True, False]), ('<think>a', 'length', [False]),
                                   ('<tool_call>{"name": "f", "arguments": {"a', 'stop', [False]),
                                   ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', 'length', [True])):
        one, _ = read(text, (), finish)
        assert [block.complete for block in one.blocks.all] == complete, text


def test_the_end_of_a_response_follows_from_the_finish():
    for finish, status in (('stop', 'completed'), ('length', 'incomplete'), ('abort', 'cancelled')):
        response = new_response('resp_1', ResponsesRequest(model='m', input='x'))
        one, _ = read('text', (), finish)
        finish_response(response, finish, one.blocks.all, Usage(3, 2, 1, 0))
        assert response.status == status and response.usage.total_tokens == 5
        assert (response.incomplete_details is not None) is (finish == 'length')
        assert (response.completed_at is None) is (finish == 'length')


JSON = st.recursive(st.none() | st.booleans() | st.integers(-999, 999) | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
                    max_leaves=8)


@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4), st.data())
def test_what_is_known_of_an_object_that_broke_off_is_true(value, data):
    text = json.dumps(value, ensure_ascii=data.draw(st.booleans()))
    assert partial_object(text) == value
    assert within(partial_object(text[:data.draw(st.integers(0, len(text)))]), value)


def within(part, whole) -> bool:
    """Whether ``part`` is a beginning of ``whole``: members that are there are right, of lists the first ones."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and within(value, whole[key]) for key, value in part.items())
    if isinstance(part, list) and isinstance(whole, list):
        return len(part) <= len(whole) and all(map(within, part, whole))
    return part == whole and type(part) is type(whole)


def test_text_that_is_no_object_is_an_empty_one():
    for text in ('', ' ', 'x', '[1, 2]', '1', '}', '{]', '{"a" 1, "b": 2}', '[' * 5000):
        assert partial_object(text) == {}

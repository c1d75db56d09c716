"""Conversations that come in items: what belongs to one message, and that earlier messages stay as they are."""

from __future__ import annotations

import copy

import pytest

from lmdeploy.serve.blocks import Block
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.turns import Turns

CALL = {'id': 'c1', 'type': 'function', 'function': {'name': 'f', 'arguments': '{}'}}


def test_what_the_assistant_does_in_a_row_is_one_message():
    turns = Turns()
    turns.say('user', 'a')
    turns.think('b')
    turns.say('assistant', 'c')
    turns.think('d')
    turns.call('c1', 'f', '{}', 'x')
    turns.say('assistant', 'e')
    turns.result('c1', 'g', 'x')
    turns.call('c2', 'f', '{}', 'x')
    assert turns.messages == [
        {'role': 'user', 'content': 'a'},
        {'role': 'assistant', 'content': 'c\ne', 'reasoning_content': 'b\nd', 'tool_calls': [CALL]},
        {'role': 'tool', 'tool_call_id': 'c1', 'name': 'f', 'content': 'g'},
        {'role': 'assistant', 'content': None, 'tool_calls': [CALL | {'id': 'c2'}]}]


@pytest.mark.parametrize(('join', 'users'), [(True, ['a\nb']), (False, ['a', 'b'])])
def test_neighbours_are_joined_where_that_is_asked_for(join, users):
    turns = Turns(join=join)
    turns.say('system', 's')
    turns.say('user', 'a')
    turns.say('user', 'b')
    assert [message['content'] for message in turns.messages] == ['s', *users]


def test_a_conversation_goes_on_and_what_was_said_stays():
    before = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b', 'tool_calls': [CALL]}]
    kept = copy.deepcopy(before)
    turns = Turns(before)
    turns.call('c2', 'g', '{}', 'x')
    turns.result('c1', 'done', 'x')
    assert [len(message.get('tool_calls', ())) for message in turns.messages] == [0, 2, 0]
    assert turns.messages[-1]['name'] == 'f' and before == kept
    assert Turns(before).messages == kept


def test_an_answer_continues_the_message_that_was_begun():
    said = [Block(0, 'text', '', pieces=['lo', '!']), Block(1, 'call', 'c1', 'f', ['{}'])]
    begun = Turns([{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'hel'}])
    begun.answer(said)
    assert begun.messages[1:] == [{'role': 'assistant', 'content': 'hello!', 'tool_calls': [CALL]}]
    new = Turns([{'role': 'user', 'content': 'a'}])
    new.answer([Block(0, 'reasoning', '', pieces=['hm']), *said])
    assert new.messages[1:] == [
        {'role': 'assistant', 'content': 'lo!', 'reasoning_content': 'hm', 'tool_calls': [CALL]}]


def test_calls_and_results_belong_together():
    turns = Turns([{'role': 'assistant', 'content': None, 'tool_calls': [CALL]}])
    with pytest.raises(HttpError, match='two calls have the id'):
        turns.call('c1', 'f', '{}', 'x')
    with pytest.raises(HttpError, match='no call before it'):
        turns.result('c9', 'x', 'x')

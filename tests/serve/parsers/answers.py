"""Answers as models write them, well and badly, and ways to cut them into pieces."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import count

from hypothesis import strategies as st

from lmdeploy.serve.parsers import AnswerParser, NamedCall, RequiredCalls, collect, tool_parser
from lmdeploy.serve.parsers.base import CallArguments, CallEnd, CallStart, Content, Event, Frame, Reasoning

OFFERED = ('get_weather', 'f')
PARSERS: dict[str, Callable[..., object]] = {
    'qwen': lambda **more: tool_parser('qwen', names=OFFERED, **more),
    'internlm': lambda **more: tool_parser('internlm', names=OFFERED, **more),
    'llama3': lambda **more: tool_parser('llama3', names=OFFERED, **more),
    'required': lambda **more: RequiredCalls(**more),
    'named': lambda **more: NamedCall('f', **more),
}
MARKERS = ('<tool_call>', '</tool_call>', '<|action_start|>', '<|plugin|>', '<|action_end|>', '<|python_tag|>',
           '<function=', '</function>', '<think>', '</think>', '```json', '```')


def ids() -> Callable[[], str]:
    numbers = count()
    return lambda: f'call-{next(numbers)}'


def new_parser(name: str):
    return PARSERS[name](new_id=ids())


def cut(text: str, at: Iterable[int]) -> list[str]:
    """``text`` in pieces that end at the given positions."""
    ends = sorted({min(max(0, i), len(text)) for i in at} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends], ends)]


def read(parser, pieces: Iterable[str]) -> list[Event]:
    """All events, with neighbours of one kind joined: what a client has in the end."""
    events: list[Event] = []
    for piece in pieces:
        events += parser.push(piece)
    events += parser.flush()
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, (Content, Reasoning, Frame, CallArguments)):
            assert event.text, 'an event without text'
            if type(last) is type(event):
                assert not isinstance(event, CallArguments) or event.index == last.index
                joined[-1] = CallArguments(event.index, last.text + event.text) \
                    if isinstance(event, CallArguments) else type(event)(last.text + event.text)
                continue
        joined.append(event)
    return joined


def source(events: Iterable[Event]) -> str:
    """The answer that the events were made of."""
    return ''.join(event.text for event in events if isinstance(event, (Content, Frame, CallArguments)))


def check_grammar(events: Sequence[Event]) -> None:
    """Calls do not overlap, are numbered, begin and end once."""
    current, calls = None, 0
    for event in events:
        if isinstance(event, CallStart):
            assert current is None and event.index == calls and event.id == f'call-{calls}' and event.name
            current, calls = event, calls + 1
        elif isinstance(event, CallArguments):
            assert current is not None and event.index == current.index and not current.arguments
        elif isinstance(event, CallEnd):
            assert current is not None and event.index == current.index
            current = None
        elif isinstance(event, Content):
            assert current is None
    assert current is None
    for call in collect(events).calls:
        if call.complete:
            assert isinstance(json.loads(call.arguments), dict)


# Well-formed answers.

awkward = st.text(st.sampled_from('ab {}[]"\\\n:,é漢😀\u2028'), max_size=12)
texts = awkward | st.sampled_from(MARKERS) | st.text(max_size=5)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(st.none() | st.booleans() | numbers | texts,
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
                      max_leaves=8)
arguments = st.dictionaries(texts, values, max_size=3)
gaps = st.text(st.sampled_from(' \n\t'), max_size=3)
prose = st.text(st.sampled_from('abc<>|/ .é漢😀'), max_size=12).map(lambda s: s.strip() and f'{s.strip()}.')


@st.composite
def objects(draw, key: str) -> tuple[str, str, str]:
    """(name, arguments as text, the call's object as text)."""
    name = draw(st.sampled_from(OFFERED))
    body = json.dumps(draw(arguments), ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    parts = [f'"name":{draw(gaps)}{json.dumps(name)}', f'"{key}":{draw(gaps)}{body}']
    if draw(st.booleans()):
        parts.append('"id": "x"')
    gap = draw(gaps)
    return name, body, '{' + gap + f'{gap},{gap}'.join(draw(st.permutations(parts))) + gap + '}'


@st.composite
def answers(draw, form: str) -> tuple[str, str | None, list[tuple[str, str]]]:
    """(answer, its content, its calls as (name, arguments))."""
    key = 'arguments' if form == 'qwen' else 'parameters'
    before, after = draw(prose), draw(prose)
    text, found = before, []
    for _ in range(draw(st.integers(1, 3))):
        name, body, whole = draw(objects(key))
        found.append((name, body))
        gap = draw(gaps)
        if form == 'qwen':
            text += f'{gap}<tool_call>{gap}{whole}{gap}</tool_call>'
        elif form == 'internlm':
            text += f'{gap}<|action_start|><|plugin|>{gap}{whole}<|action_end|>'
        elif draw(st.booleans()):
            text += f'{gap}<|python_tag|>{whole}'
        else:
            text += f'{gap}<function={name}>{body}</function>'
    return text + after, before + after or None, found


# Badly formed ones.

def mutate(text: str, rng: random.Random) -> str:
    """Some characters lost, doubled, exchanged, or markers put in."""
    for _ in range(rng.randint(1, 3)):
        i, j = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        way = rng.randrange(5)
        if way == 0:
            text = text[:i] + text[min(j, i + rng.randint(1, 8)):]
        elif way == 1:
            text = text[:i] + rng.choice(MARKERS) + text[i:]
        elif way == 2:
            text = text[:i] + rng.choice('{}[]"\\,:<>;\n\x00 \ud800é0n') + text[i:]
        elif way == 3:
            text = text[:j] + text[i:j] + text[j:]
        else:
            text = text[:i]
    return text


EXAMPLES = (
    'Let me look.\n<tool_call>\n'
    '{"name": "get_weather", "arguments": {"city": "Paris \\"}\\u00e9", "n": [1, {"a": null}]}}'
    '\n</tool_call>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    '```json\n{"name": "f", "arguments": {"code": "<tool_call>{}</tool_call>"}}\n```\nDone.',
    'Yes.<|action_start|><|plugin|>\n{"name": "f", "parameters": {"x": -1.5e3}}<|action_end|>\n',
    '<|python_tag|>{"type": "function", "name": "f", "parameters": {"q": "漢😀"}}; {"name": "f", "parameters": {}}',
    '{"name": "f", "parameters": {"a": {"b": [[]]}}}',
    'Well <function=get_weather>{"city": "<function=f>"}</function> and more',
    '[{"name": "f", "parameters": {"a": 1}}, {"arguments": {"b": "]"}, "name": "get_weather"}]',
    '{"city": "Berlin", "days": 3}',
    'No call < here, <b>only</b> {"json": 1}.',
    '<think>\nhm\n</think>\n\nanswer',
)


def one_shot(parser, text: str) -> list[Event]:
    return read(parser, [text])


def answer_parser(name: str, reasoning=None) -> AnswerParser:
    return AnswerParser(reasoning, new_parser(name))

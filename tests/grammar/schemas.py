"""Schemas as people write them, small enough that a model of random weights finishes an answer."""

from __future__ import annotations

from typing import Any


def closed(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """An object of these properties and no others; all required unless told."""
    return {'type': 'object', 'properties': properties, 'additionalProperties': False,
            'required': list(properties) if required is None else required}


WORD = {'type': 'string', 'maxLength': 8}
DIGIT = {'type': 'integer', 'minimum': 0, 'maximum': 9}
YES = {'type': 'boolean'}
NULL = {'type': 'null'}


def few(items: Any, most: int = 3, least: int = 0) -> dict[str, Any]:
    """A short list."""
    return {'type': 'array', 'items': items, 'minItems': least, 'maxItems': most}


SCHEMAS: dict[str, Any] = {
    # scalars
    'null': NULL,
    'boolean': YES,
    'digit': DIGIT,
    'negative': {'type': 'integer', 'minimum': -20, 'maximum': -3},
    'exclusive': {'type': 'integer', 'exclusiveMinimum': 3, 'exclusiveMaximum': 7},
    'real': {'type': 'number', 'minimum': 0.5, 'maximum': 0.75, 'multipleOf': 0.25},
    'even': {'type': 'integer', 'minimum': 0, 'maximum': 1000, 'multipleOf': 2},
    'sevens': {'type': 'integer', 'minimum': -700, 'maximum': 700, 'multipleOf': 7},
    'word': WORD,
    'exact length': {'type': 'string', 'minLength': 4, 'maxLength': 4},
    'empty text': {'type': 'string', 'maxLength': 0},
    'types': {'type': ['integer', 'null', 'boolean'], 'minimum': 0, 'maximum': 99},
    'true in a list': few(True, 0),
    # patterns and formats
    'zip': {'type': 'string', 'pattern': '^[0-9]{5}(-[0-9]{4})?$'},
    'ends': {'type': 'string', 'pattern': r'\.txt$', 'maxLength': 6},
    'chinese pattern': {'type': 'string', 'pattern': '^[\u4e00-\u9fff]{2,4}$'},
    'either end': {'type': 'string', 'pattern': '^(a|b)[a-c]{0,3}$'},
    'date': {'type': 'string', 'format': 'date'},
    'ipv4': {'type': 'string', 'format': 'ipv4'},
    'uuid': {'type': 'string', 'format': 'uuid'},
    # values
    'enum': {'enum': ['red', 'green', 'blue']},
    'mixed enum': {'enum': ['red', 7, None, True, [1, 2], {'a': {'b': 'c'}}, 2.5]},
    'typed enum': {'type': 'integer', 'enum': [1, 'one', 2]},
    'unicode enum': {'enum': ['北京', 'Zürich', 'naïve', '🙂', 'a"b\\c', 'line\nbreak', '\x01']},
    'const': {'const': {'kind': 'point', 'at': [0, 0]}},
    'escaped const': {'const': 'tab\t "quote" back\\slash /'},
    'large enum': {'enum': [f'entry {i}' for i in range(400)]},
    # arrays
    'digits': few(DIGIT, 5),
    'at least two': few(DIGIT, 4, 2),
    'matrix': few(few(DIGIT, 2, 2), 2, 2),
    'tuple': {'type': 'array', 'prefixItems': [DIGIT, YES, WORD], 'items': False, 'minItems': 3},
    'open tuple': {'type': 'array', 'prefixItems': [YES], 'items': DIGIT, 'minItems': 1, 'maxItems': 4},
    'empty list': few(DIGIT, 0),
    'list of either': few({'anyOf': [DIGIT, YES, NULL]}, 4, 1),
    'list of enums': few({'enum': ['北', '南']}, 4, 1),
    # objects
    'point': closed(x=DIGIT, y=DIGIT),
    'person': closed(name=WORD, age={'type': 'integer', 'minimum': 0, 'maximum': 150}, married=YES),
    'optional': closed([], a=DIGIT, b=DIGIT, c=DIGIT),
    'first optional': closed(['c'], a=DIGIT, b=DIGIT, c=DIGIT),
    'no properties': closed(),
    'unicode names': closed(名前=WORD, âge=DIGIT, **{'a b': YES, 'quote"': NULL, 'back\\slash': NULL, '🙂': DIGIT}),
    'keywords as names': closed(type=DIGIT, properties=YES, format=NULL, **{'$ref': WORD, 'enum': DIGIT, 'x-y': YES}),
    'nested': closed(a=closed(b=closed(c=closed(d=DIGIT)))),
    'deep list': closed(rows=few(closed(cells=few(closed(v=DIGIT), 2, 1)), 2, 1)),
    'map': {'type': 'object', 'properties': {}, 'patternProperties': {'^[a-z]{1,3}$': DIGIT},
            'additionalProperties': False, 'maxProperties': 2},
    'typed map': {'type': 'object', 'additionalProperties': DIGIT, 'maxProperties': 1, 'minProperties': 1},
    'required by name': {'type': 'object', 'required': ['id'], 'additionalProperties': DIGIT, 'maxProperties': 1},
    'annotated': {'$schema': 'https://json-schema.org/draft/2020-12/schema', '$id': 'https://example.org/s',
    'title': 'T',
                  'description': 'D', **closed(n={**DIGIT, 'title': 'N', 'default': 3, 'examples': [1]}),
                  'x-order': 1},
    # combinations
    'any of': {'anyOf': [closed(kind={'const': 'circle'}, r=DIGIT), closed(kind={'const': 'square'}, side=DIGIT)]},
    'one of': {'oneOf': [closed(kind={'const': 'a'}, v=DIGIT), closed(kind={'const': 'b'}, v=YES)]},
    'one of types': {'oneOf': [DIGIT, {'type': 'string', 'maxLength': 3}, NULL]},
    'all of': {'allOf': [{'type': 'integer', 'minimum': 3}, {'maximum': 5}]},
    'all of objects': {'allOf': [{'type': 'object', 'properties': {'a': DIGIT}, 'required': ['a']},
                                 {'properties': {'b': YES}, 'required': ['b'], 'maxProperties': 2}],
                       'type': 'object', 'properties': {'a': True, 'b': True}, 'additionalProperties': False},
    'optional by any of': closed(value={'anyOf': [DIGIT, NULL]}),
    # references
    'definition': {**closed(a={'$ref': '#/$defs/d'}, b={'$ref': '#/$defs/d'}), '$defs': {'d': DIGIT}},
    'old definitions': {**closed(a={'$ref': '#/definitions/d'}), 'definitions': {'d': YES}},
    'escaped reference': {**closed(a={'$ref': '#/$defs/x~1y~0z%20w'}), '$defs': {'x/y~z w': DIGIT}},
    'reference to a property': closed(a=DIGIT, b={'$ref': '#/properties/a'}),
    'reference with siblings': {**closed(a={'$ref': '#/$defs/d', 'minimum': 5}), '$defs': {'d': DIGIT}},
    'tree': {'$ref': '#/$defs/node', '$defs': {'node': closed(['v'], v=DIGIT, kids=few({'$ref': '#/$defs/node'}, 1))}},
    'linked list': {'$ref': '#/$defs/l', '$defs': {'l': {'anyOf': [NULL, closed(head=DIGIT,
    tail={'$ref': '#/$defs/l'})]}}},
    'mutual': {'$ref': '#/$defs/a', '$defs': {'a': closed([], b={'$ref': '#/$defs/b'}),
                                             'b': closed([], a={'$ref': '#/$defs/a'})}},
}

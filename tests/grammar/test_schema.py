"""Which schemas are taken, and what becomes of them: everything in them is enforced, or the request is refused."""

from __future__ import annotations

import json

import pytest

from lmdeploy.errors import RequestError
from lmdeploy.grammar.formats import read_format, schema_source
from lmdeploy.grammar.limits import MAX_BYTES, MAX_COUNT, MAX_DEPTH, MAX_ENTRIES, MAX_INTEGER, MAX_MULTIPLE
from lmdeploy.grammar.schema import check_schema
from lmdeploy.grammar.tools import named_call, required_calls


def refused(schema):
    with pytest.raises(RequestError) as caught:
        check_schema(schema)
    return caught.value


@pytest.mark.parametrize('keyword', [
    'not', 'if', 'then', 'else', 'contains', 'uniqueItems', 'dependentRequired', 'dependentSchemas', 'propertyNames',
    'unevaluatedProperties', 'unevaluatedItems', '$dynamicRef', '$anchor', '$vocabulary', 'x-guidance', 'requierd',
    'nullable',
    'contentEncoding', 'minContains', 'additionalItems', 'lenient', '',
])
@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'properties': {'a': s}}, lambda s: {'anyOf': [True, s]}])
def test_a_keyword_that_is_not_enforced_is_named(keyword, wrap):
    error = refused(wrap({'type': 'string', keyword: True}))
    assert (error.code, error.params['keyword']) == ('LMD-322', keyword)


@pytest.mark.parametrize('schema', [{'type': 'string', 'format': 'regex'}, {'format': 'uri-reference'},
        {'minProperties': 2},
                                    {'properties': {'a': {'$id': 'x'}}}])
def test_formats_and_forms_that_cannot_be_enforced_are_refused(schema):
    assert refused(schema).code == 'LMD-322'


@pytest.mark.parametrize('schema', [
    3, 'text', None, [], {'type': 'foo'}, {'type': []}, {'type': 3}, {'type': ['string', 4]}, {'enum': []},
    {'enum': 'a'},
    {'properties': []}, {'properties': {'a': 3}}, {'required': 'a'}, {'required': [1]}, {'anyOf': []}, {'anyOf': {}},
    {'items': [{}]}, {'items': 3}, {'prefixItems': {}}, {'minItems': -1}, {'minItems': 1.5}, {'minItems': True},
    {'maxLength': '3'}, {'minimum': '3'}, {'minimum': True}, {'exclusiveMinimum': True}, {'multipleOf': 0},
    {'multipleOf': -1},
    {'pattern': 3}, {'format': 3}, {'$ref': 3}, {'$ref': '#a'}, {'$ref': 'http://example.com/a'},
    {'$ref': 'file:///etc/passwd'},
    {'$ref': '#/$defs/missing'}, {'$ref': '#/type', 'type': 'string'}, {'$defs': {'a': 3}}, {3: 4},
    {'const': object()},
    {'const': float('nan')}, {'const': float('inf')}, {'const': MAX_INTEGER + 1}, {'const': 10**400},
    {'const': '\ud800'},
    {'\udfff': 1}, {'const': b'bytes'}, {'const': {1: 2}},
])
def test_what_is_no_schema_is_refused(schema):
    assert refused(schema).code in ('LMD-323', 'LMD-322')


@pytest.mark.parametrize('schema', [
    False, {'$ref': '#'}, {'allOf': [{'$ref': '#'}]}, {'anyOf': [{'$ref': '#'}]}, {'anyOf': [False, False]},
    {'$ref': '#/$defs/a', '$defs': {'a': {'$ref': '#/$defs/b'}, 'b': {'$ref': '#/$defs/a'}}},
    {'type': 'object', 'properties': {'a': {'$ref': '#'}}, 'required': ['a']},
    {'type': 'object', 'required': ['a'], 'additionalProperties': {'$ref': '#'}},
    {'type': 'array', 'items': {'$ref': '#'}, 'minItems': 1},
    {'type': 'array', 'prefixItems': [True, {'$ref': '#'}], 'minItems': 2},
    {'type': 'object', 'properties': {'a': False}, 'required': ['a']},
])
def test_a_schema_without_a_finite_value_is_refused(schema):
    assert 'finite' in refused(schema).params['reason']


@pytest.mark.parametrize('schema', [
    True, {}, {'type': 'object', 'properties': {'a': {'$ref': '#'}}}, {'anyOf': [{'$ref': '#'}, {'type': 'null'}]},
    {'type': 'array', 'items': {'$ref': '#'}}, {'type': 'array', 'prefixItems': [True, {'$ref': '#'}], 'minItems': 1},
    {'properties': {'a': False}}, {'$defs': {'never': False}, 'type': 'null'},
    {'type': ['object', 'null'], 'properties': {'a': {'$ref': '#'}}, 'required': ['a']},
])
def test_recursion_that_can_end_is_taken(schema):
    check_schema(schema)


def nested(depth):
    schema = {'type': 'null'}
    for _ in range(depth):
        schema = {'anyOf': [schema]}
    return schema


def test_each_limit_is_where_it_says():
    at_most = [
        {'enum': list(range(MAX_ENTRIES))},
        {'properties': {str(i): True for i in range(MAX_ENTRIES)}},
        {'maxItems': MAX_COUNT}, {'maxItems': float(MAX_COUNT)}, {'const': MAX_INTEGER}, {'multipleOf': MAX_MULTIPLE},
        {'multipleOf': 1e-4}, nested(15), {'const': 'x' * (MAX_BYTES - 100)},
        {'allOf': [{'multipleOf': 16}, {'multipleOf': 0.2}]},
    ]
    for schema in at_most:
        check_schema(schema)
    beyond = [
        {'enum': list(range(MAX_ENTRIES + 1))},
        {'anyOf': [{'enum': list(range(600))}, {'properties': {str(i): True for i in range(400)}}]},
        {'maxItems': MAX_COUNT + 1}, {'multipleOf': MAX_MULTIPLE + 1}, {'multipleOf': 1e-300}, {'multipleOf': 1e300},
        {'multipleOf': 99_999_989}, {'allOf': [{'multipleOf': 9973}, {'multipleOf': 9967}]},
        {'allOf': [{'multipleOf': 1e-4}, {'multipleOf': 3}]}, nested(MAX_DEPTH), {'const': 'x' * MAX_BYTES},
    ]
    for schema in beyond:
        assert refused(schema).code == 'LMD-321', schema


def test_annotations_are_dropped_and_data_is_kept():
    schema = {'$schema': 'x', '$id': 'y', 'title': 't', 'x-nullable': True, 'type': 'object',
              'properties': {'title': {'const': {'title': 1, 'not': 2}, 'description': 'd'},
              'x-a': {'enum': [{'if': 1}]}}}
    assert check_schema(schema) == {
        'type': 'object', 'properties': {'title': {'const': {'title': 1, 'not': 2}}, 'x-a': {'enum': [{'if': 1}]}}}


def test_what_was_checked_is_taken_again_unchanged():
    from tests.grammar.schemas import SCHEMAS

    for name, schema in SCHEMAS.items():
        checked = check_schema(schema)
        if 'format' not in json.dumps(checked):
            assert check_schema(checked) == checked, name


FORMS = [
    ({'type': 'json_object'}, '{"type":"object"}'),
    ({'type': 'json_schema', 'json_schema': {'name': 'n', 'schema': {'type': 'null'}}}, '{"type":"null"}'),
    ({'type': 'json_schema', 'json_schema': {'name': 'n', 'schema': {'type': 'null'}, 'strict': True,
    'description': 'd'}},
     '{"type":"null"}'),
    ({'type': 'json_schema', 'json_schema': {'name': 'n', 'json_schema': {'type': 'null'}}}, '{"type":"null"}'),
    ({'type': 'json_schema', 'json_schema': {'type': 'null'}}, '{"type":"null"}'),
    ({'type': 'json_schema', 'json_schema': '{"type": "null"}'}, '{"type":"null"}'),
    ({'type': 'json_schema', 'json_schema': {'schema': '{"type": "null"}'}}, '{"type":"null"}'),
    ({'type': 'json_schema', 'json_schema': {'type': 'null'}, 'regex_schema': None}, '{"type":"null"}'),
    ({'type': 'regex_schema', 'regex_schema': r'\d'}, '[0-9]'),
]


@pytest.mark.parametrize('form, text', FORMS, ids=str)
def test_all_forms_of_response_format(form, text):
    assert read_format(form).text == text


@pytest.mark.parametrize('form', [None, {'type': 'text'}])
def test_text_is_no_constraint(form):
    assert read_format(form) is None


@pytest.mark.parametrize('form', [
    {}, [], 'json_object', 3, True, {'type': None}, {'type': []}, {'type': 'xml'}, {'type': 'json_schema'},
    {'type': 'regex_schema'},
    {'type': 'json_schema', 'json_schema': None}, {'type': 'json_schema', 'json_schema': 3},
    {'type': 'json_schema', 'json_schema': []},
    {'type': 'json_schema', 'json_schema': {'name': 'n'}}, {'type': 'json_schema', 'json_schema': {'name': 3,
    'schema': {}}},
    {'type': 'json_schema', 'json_schema': {'schema': {}, 'strict': 'yes'}},
    {'type': 'json_schema', 'json_schema': {'schema': {}, 'json_schema': {}}},
    {'type': 'json_schema', 'json_schema': {'schema': 3}}, {'type': 'json_schema', 'schema': {}},
    {'type': 'regex_schema', 'regex_schema': 3}, {'type': 'json_object', 'json_schema': {}},
    {'type': 'json_object', 'strict': True},
    {'type': 'regex_schema', 'regex_schema': 'a', 'json_schema': {}}, {'type': 'x' * 10**6},
])
def test_other_forms_are_refused_in_few_words(form):
    with pytest.raises(RequestError) as caught:
        read_format(form)
    assert caught.value.code == 'LMD-320'
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize('text', ['', '{', '[' * 60_000, '{"a": 1e999}', 'NaN', '9' * 5000, '{"const": "\\ud800"}'])
def test_json_text_that_is_no_schema_is_refused(text):
    with pytest.raises(RequestError) as caught:
        read_format({'type': 'json_schema', 'json_schema': text})
    assert caught.value.code in ('LMD-320', 'LMD-322', 'LMD-323')


def tool(parameters, name='f'):
    return {'type': 'function', 'function': {'name': name, 'parameters': parameters}}


def test_references_of_tools_stay_their_own():
    schema = {'$ref': '#/$defs/a', '$defs': {'a': {'anyOf': [{'type': 'null'}, {'type': 'array',
    'items': {'$ref': '#'}}]}}}
    form = required_calls([tool(schema, 'f'), tool(schema, 'g')])
    definitions = form['json_schema']['schema']['$defs']
    assert definitions['tool1']['$ref'] == '#/$defs/tool1/$defs/a'
    assert definitions['tool1']['$defs']['a']['anyOf'][1]['items']['$ref'] == '#/$defs/tool1'
    schema_source(form['json_schema']['schema'])


@pytest.mark.parametrize('tools', [[], [3], [{}], [{'function': {}}], [{'function': {'name': 3}}],
        [{'function': {'name': ''}}]])
def test_what_is_no_tool_is_refused(tools):
    with pytest.raises(RequestError) as caught:
        required_calls(tools)
    assert caught.value.code == 'LMD-329'


def test_a_forced_function_must_be_among_the_tools():
    with pytest.raises(RequestError) as caught:
        named_call([tool({}, 'f')], 'g')
    assert caught.value.code == 'LMD-329'


@pytest.mark.parametrize('parameters', [{'not': {}}, 3, {'type': 'foo'}])
def test_a_tool_of_which_the_schema_cannot_be_enforced_is_refused(parameters):
    for call in (lambda: required_calls([tool(parameters)]), lambda: named_call([tool(parameters)], 'f')):
        with pytest.raises(RequestError):
            call()


def test_many_tools_share_the_limits():
    tools = [tool({'type': 'object', 'properties': {f'p{j}': True for j in range(300)}}, f'f{i}') for i in range(4)]
    with pytest.raises(RequestError) as caught:
        required_calls(tools)
    assert caught.value.code == 'LMD-321'

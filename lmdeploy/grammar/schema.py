"""JSON schemas: which are accepted, and what is handed to the compiler.

Every keyword is either enforced exactly or refused, and so is every unknown one: a misspelt ``requierd`` is an error
and no schema that lets anything pass. Annotations (title, description, default ...) are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from lmdeploy.errors import RequestError
from lmdeploy.grammar.limits import MAX_COUNT, MAX_DEPTH, Budget, measure, too_large
from lmdeploy.grammar.regex import scan, shortened

TYPES = frozenset({'null', 'boolean', 'integer', 'number', 'string', 'array', 'object'})
FORMATS = frozenset({'date-time', 'time', 'date', 'duration', 'email', 'hostname', 'ipv4', 'ipv6', 'uuid', 'uri'})
ANNOTATIONS = frozenset({'$schema', '$comment', 'title', 'description', 'default', 'examples', 'example', 'deprecated',
                         'readOnly', 'writeOnly', 'discriminator'})

# What the automata's formats leave open: 29 February is in leap years only, there is no year 0, and a leap second is
# nothing that a parser of dates takes.
_YEAR = '(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})'
_LEAP = '([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)'
_DATE = f'({_YEAR}-(0[13-9]|1[0-2])-[0-9]{{2}}|{_YEAR}-02-([01][0-9]|2[0-8])|{_LEAP}-02-29)'
_MINUTE = '[0-9]{2}:[0-9]{2}:[0-5]'
EXACT = {'date': f'^{_DATE}$', 'date-time': f'^{_DATE}[Tt]{_MINUTE}', 'time': f'^{_MINUTE}'}


@dataclass(slots=True)
class _Node:
    """What a schema needs to have a finite instance: ``all`` of some others, and one of each group in ``any``."""

    all: list[str] = field(default_factory=list)
    any: list[list[str]] = field(default_factory=list)


def check_schema(schema: Any, *, base: str = '', budget: Budget | None = None) -> Any:
    """The schema without its annotations, every keyword of it known to be enforced.

    Args:
        base: JSON pointer of the place where the result will stand in a larger schema; its references are adapted.
        budget: what is left of the limits.

    Raises:
        RequestError: LMD-321 (too large), LMD-322 (a keyword or format that cannot be enforced), LMD-323 (not a valid
            schema), LMD-324 (a pattern).
    """
    measure(schema)
    checker = _Checker(base, budget or Budget())
    result = checker.schema(schema, '', 1)
    checker.check_references()
    return result


class _Checker:
    """One walk over a schema; places are JSON pointers from its root."""

    def __init__(self, base: str, budget: Budget) -> None:
        self.base, self.budget = base, budget
        self.nodes: dict[str, _Node] = {}
        self.references: list[tuple[str, str]] = []  # (place, pointer it leads to)

    def schema(self, schema: Any, at: str, depth: int) -> Any:
        """The accepted form of the schema at ``at``."""
        node = self.nodes[at] = _Node()
        if isinstance(schema, bool):
            if not schema:
                node.any.append([])
            return schema
        if not isinstance(schema, dict):
            raise _invalid(at, f'a schema is an object, true or false, not {shortened(repr(schema))}')
        if depth > MAX_DEPTH:
            raise too_large('nesting depth', f'more than {MAX_DEPTH}', MAX_DEPTH)
        result = {}
        for name, value in schema.items():
            if name in ANNOTATIONS or (name.startswith('x-') and name != 'x-guidance') or (name == '$id' and not at):
                continue
            handler = _KEYWORDS.get(name)
            if handler is None:
                raise RequestError('LMD-322', where=f'#{at}', keyword=name)
            result[name] = handler(self, value, f'{at}/{escape(name)}', depth + 1)
        self._relate(node, result, at)
        exact = EXACT.get(result.get('format', ''))
        if exact is not None:
            result['allOf'] = [*result.get('allOf', ()), {'pattern': exact}]
        return result

    def _relate(self, node: _Node, schema: dict[str, Any], at: str) -> None:
        """What an instance of ``schema`` must contain, or be an instance of as well."""
        node.all += [f'{at}/allOf/{i}' for i in range(len(schema.get('allOf', ())))]
        for name in ('anyOf', 'oneOf'):
            if name in schema:
                node.any.append([f'{at}/{name}/{i}' for i in range(len(schema[name]))])
        if '$ref' in schema:
            node.all.append(unquote(schema['$ref'][1 + len(self.base):]))
        if schema.get('type') in ('object', ['object']):
            for name in schema.get('required', ()):
                if name in schema.get('properties', ()):
                    node.all.append(f'{at}/properties/{escape(name)}')
                elif 'additionalProperties' in schema and 'patternProperties' not in schema:
                    node.all.append(f'{at}/additionalProperties')
        if schema.get('type') in ('array', ['array']):
            prefix, least = len(schema.get('prefixItems', ())), schema.get('minItems', 0)
            node.all += [f'{at}/prefixItems/{i}' for i in range(min(prefix, least))]
            if least > prefix and 'items' in schema:
                node.all.append(f'{at}/items')

    # -- one method per kind of keyword ---------------------------------------------------------------------------

    def sub(self, value: Any, at: str, depth: int) -> Any:
        return self.schema(value, at, depth)

    def several(self, value: Any, at: str, depth: int) -> list[Any]:
        if not isinstance(value, (list, tuple)) or not value:
            raise _invalid(at, 'it must be a list of schemas, and not empty')
        self.budget.take_entries(len(value))
        return [self.schema(item, f'{at}/{i}', depth) for i, item in enumerate(value)]

    def named(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _invalid(at, 'it must be an object of schemas')
        self.budget.take_entries(len(value))
        return {name: self.schema(item, f'{at}/{escape(name)}', depth) for name, item in value.items()}

    def patterns(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        result = self.named(value, at, depth)
        for pattern in result:
            scan(pattern, self.budget, translate=False)
        return result

    def reference(self, value: Any, at: str, depth: int) -> str:
        if not isinstance(value, str) or not (value == '#' or value.startswith('#/')):
            raise _invalid(at, f'only references within the schema (#/...) are followed, not {shortened(repr(value))}')
        self.references.append((at, unquote(value[1:])))
        return f'#{self.base}{value[1:]}'

    def types(self, value: Any, at: str, depth: int) -> str | list[str]:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not names or not all(
                isinstance(name, str) and name in TYPES for name in names):
            raise _invalid(at, f'{shortened(repr(value))} is none of the types {", ".join(sorted(TYPES))}')
        return value if isinstance(value, str) else list(dict.fromkeys(names))

    def values(self, value: Any, at: str, depth: int) -> list[Any]:
        if not isinstance(value, (list, tuple)) or not value:
            raise _invalid(at, 'it must be a list of values, and not empty')
        self.budget.take_entries(len(value))
        return list(value)

    def value(self, value: Any, at: str, depth: int) -> Any:
        return value

    def names(self, value: Any, at: str, depth: int) -> list[str]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
            raise _invalid(at, 'it must be a list of property names')
        names = list(dict.fromkeys(value))
        self.budget.take_entries(len(names))
        return names

    def count(self, value: Any, at: str, depth: int) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise _invalid(at, f'it must be a whole number from 0 on, not {shortened(repr(value))}')
        if value > MAX_COUNT:
            raise too_large(at.rpartition('/')[2], value, MAX_COUNT)
        return value

    def least_properties(self, value: Any, at: str, depth: int) -> int:
        count = self.count(value, at, depth)
        if count > 1:  # keys may come twice where they are free, and then count once
            raise RequestError('LMD-322', where=f'#{at}', keyword=f'minProperties: {count}')
        return count

    def number(self, value: Any, at: str, depth: int) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise _invalid(at, f'it must be a number, not {shortened(repr(value))}')
        return value

    def multiple(self, value: Any, at: str, depth: int) -> float:
        if self.number(value, at, depth) <= 0:
            raise _invalid(at, 'it must be greater than 0')
        _, digits, exponent = Decimal(str(value)).normalize().as_tuple()
        assert isinstance(exponent, int), 'a finite number'
        if len(digits) + abs(exponent) > 16:
            raise too_large('number of digits of multipleOf', len(digits) + abs(exponent), 16)
        units = int(''.join(map(str, digits))) * 10 ** max(exponent, 0)
        self.budget.take_multiple(units, max(-exponent, 0))
        return value

    def pattern(self, value: Any, at: str, depth: int) -> str:
        if not isinstance(value, str):
            raise _invalid(at, 'it must be a text')
        return scan(value, self.budget, translate=False)

    def format(self, value: Any, at: str, depth: int) -> str:
        if not isinstance(value, str):
            raise _invalid(at, 'it must be a text')
        if value not in FORMATS:
            raise RequestError('LMD-322', where=f'#{at}', keyword=f'format: {shortened(value)}')
        return value

    # -- references -----------------------------------------------------------------------------------------------

    def check_references(self) -> None:
        """Every reference leads to a schema, and recursion can end: some instance is finite.

        The nodes with a finite instance are the least fixed point of "all of its needs have one".
        """
        for at, target in self.references:
            if target not in self.nodes:
                raise _invalid(at, f'there is no schema at #{shortened(target)}')
        finite: set[str] = set()
        left = dict(self.nodes)
        while True:
            found = [at for at, node in left.items() if finite.issuperset(node.all)
                     and all(not finite.isdisjoint(group) for group in node.any)]
            if not found:
                break
            finite.update(found)
            for at in found:
                del left[at]
        if '' not in finite:
            raise _invalid('', 'no finite value is allowed by it: it is false, or contains itself without an end')


def escape(name: str) -> str:
    """A key as a part of a JSON pointer."""
    return name.replace('~', '~0').replace('/', '~1')


def _invalid(at: str, reason: str) -> RequestError:
    return RequestError('LMD-323', where=f'#{shortened(at)}', reason=reason)


def _each(names: Iterable[str], handler: Callable[[_Checker, Any, str, int], Any]) -> dict[str, Callable]:
    return dict.fromkeys(names, handler)


_KEYWORDS: dict[str, Callable[[_Checker, Any, str, int], Any]] = {
    **_each(('items', 'additionalProperties'), _Checker.sub),
    **_each(('anyOf', 'oneOf', 'allOf', 'prefixItems'), _Checker.several),
    **_each(('properties', '$defs', 'definitions'), _Checker.named),
    **_each(('minItems', 'maxItems', 'minLength', 'maxLength', 'maxProperties'), _Checker.count),
    **_each(('minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum'), _Checker.number),
    'patternProperties': _Checker.patterns,
    '$ref': _Checker.reference,
    'type': _Checker.types,
    'enum': _Checker.values,
    'const': _Checker.value,
    'required': _Checker.names,
    'minProperties': _Checker.least_properties,
    'multipleOf': _Checker.multiple,
    'pattern': _Checker.pattern,
    'format': _Checker.format,
}

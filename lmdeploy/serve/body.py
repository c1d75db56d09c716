"""A JSON object as the type of a request's body: strict, finite, and with one rule for every field.

A field either acts, or is refused by :func:`read` where it asks for what this version cannot do, or is unknown: then it
is left out, with one line in the log and its name in the header ``x-unknown-fields`` of the response.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmdeploy.log import get_logger
from lmdeploy.serve.errors import HttpError

Item = TypeVar('Item')
Many = Annotated[list[Item], Field(fail_fast=True)]
"""A list that is left at its first wrong entry: an error for each of a million would take a minute."""
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Probability = Annotated[float, Field(gt=0, le=1)]
Refusals = Mapping[str, tuple[tuple[Any, ...], str]]
"""Known fields that a body does not have: the values that ask for nothing (None always does), and the reason."""
ELSEWHERE = 'this version does not have it'


class Body(BaseModel):
    """A JSON object of a request.

    Attributes:
        refused: the known fields that it does not have.
        no_effect: known fields that are wishes or labels, and change no answer.
    """

    refused: ClassVar[Refusals] = MappingProxyType({})
    no_effect: ClassVar[Set[str]] = frozenset()

    model_config = ConfigDict(strict=True, extra='allow', allow_inf_nan=False, hide_input_in_errors=True,
                              protected_namespaces=())


T = TypeVar('T', bound=Body)


def read(kind: type[T], value: Any) -> tuple[T, tuple[str, ...]]:
    """The body as ``kind``, and which of its fields were unknown.

    Raises:
        HttpError: LMD-512 names the first fields that are wrong; LMD-513, a field that this version does not have.
    """
    if not isinstance(value, dict):
        raise HttpError('LMD-512', param='body', reason=f'it must be a JSON object, not {_kind(value)}')
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        raise _refusal(error) from None
    unknown = []
    for name, given in (body.model_extra or {}).items():
        harmless, reason = kind.refused.get(name, ((), ''))
        if reason and given is not None and given not in harmless:
            raise HttpError('LMD-513', param=name, reason=reason)
        if not reason and name not in kind.no_effect:
            unknown.append(name)
    if unknown:
        get_logger().info('%s: unknown fields are left out: %s', kind.__name__, ', '.join(map(repr, unknown))[:200])
    return body, tuple(unknown)


def _kind(value: Any) -> str:
    return {list: 'a list', str: 'a text', bool: 'true or false', type(None): 'null'}.get(type(value), 'a number')


def _refusal(error: ValidationError) -> HttpError:
    """One error for all wrong fields: of the alternatives of a union, the one that came furthest."""
    furthest: dict[str, tuple[int, str]] = {}
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        place = [str(part) for part in problem['loc'] if not _is_tag(part)]
        field = place[0] if place else 'body'
        if field not in furthest or len(place) > furthest[field][0]:
            furthest[field] = (len(place), f'{".".join(place) or "body"}: {problem["msg"]}')
    field, (_, first) = next(iter(furthest.items()))
    reasons = [first.partition(': ')[2], *(text for _, text in list(furthest.values())[1:10])]
    return HttpError('LMD-512', param=first.partition(': ')[0][:200], reason='; '.join(reasons)[:1000])


def _is_tag(part: int | str) -> bool:
    """Whether a part of an error's place names a type of a union, not a field."""
    return isinstance(part, str) and (part in ('str', 'int', 'float', 'bool') or part[:1].isupper() or '[' in part
                                      or '-' in part)

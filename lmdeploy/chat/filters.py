"""The filters and global names of chat templates: those that published templates use, with bounded results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import update_wrapper
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.filters import FILTERS
from jinja2.utils import Namespace

from lmdeploy.chat.budget import Budget, current

MAX_RANGE = 100_000
MAX_BITS = 4096  # of integers
MAX_WIDTH = 999  # of padding

NAMES = ('abs', 'capitalize', 'count', 'd', 'default', 'dictsort', 'e', 'escape', 'first', 'float', 'groupby', 'items',
         'last', 'length', 'list', 'lower', 'map', 'max', 'min', 'reject', 'rejectattr', 'reverse', 'safe', 'select',
         'selectattr', 'sort', 'string', 'title', 'trim', 'truncate', 'unique', 'upper')
NOT_STAND_INS = re.compile('[^\x00-\x7f\U00100000-\U0010ffff]')


class Refused(TemplateError):
    """The template itself refuses a conversation, by ``raise_exception``."""


def filters() -> dict[str, Callable[..., Any]]:
    """Filter name to function. All spend from the current budget."""
    guarded = {'replace': _replace, 'indent': _indent, 'join': _join, 'sum': _sum, 'int': _int, 'tojson': tojson}
    return {name: _counted(f) for name, f in {**{name: FILTERS[name] for name in NAMES}, **guarded}.items()}


def global_names() -> dict[str, Any]:
    """The functions that a template may call."""
    return {'range': bounded_range, 'dict': make_dict, 'namespace': SafeNamespace, 'raise_exception': raise_exception,
            'strftime_now': strftime_now}


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        budget = current()
        budget.spend()
        return budget.spend_on(function(*args, **kwargs))

    return update_wrapper(counted, function)  # with jinja2's marks for filters that take the context


def before_replace(budget: Budget, text: Any, old: Any, new: Any) -> None:
    """Count what replacing makes, before it is made."""
    text, old, new = str(text), str(old), str(new)
    budget.spend(len(text) + text.count(old) * max(0, len(new) - len(old)))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text = value if isinstance(value, str) else str(value)
    before_replace(current(), text, old, new)
    return text.replace(str(old), str(new), -1 if count is None else count)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
    _check_width(width)
    text = str(s)
    current().spend((text.count('\n') + 1) * (width if isinstance(width, int) else len(width)))
    return FILTERS['indent'](text, width, first, blank)


def _check_width(width: int | str) -> None:
    if (len(width) if isinstance(width, str) else width) > MAX_WIDTH:
        raise SecurityError(f'widths are at most {MAX_WIDTH}')


def _attribute_of(value: Any, attribute: Any) -> list[Any]:
    items = list(current().count(value))
    return items if attribute is None else [item.get(attribute, '') if isinstance(item, dict) else '' for item in items]


def _join(value: Any, d: Any = '', attribute: Any = None) -> str:
    texts = [str(item) for item in _attribute_of(value, attribute)]
    current().spend(sum(map(len, texts)) + len(str(d)) * len(texts))
    return str(d).join(texts)


def _sum(value: Any, attribute: Any = None, start: float = 0) -> float:
    numbers = _attribute_of(value, attribute)
    if not all(isinstance(number, (int, float)) for number in (start, *numbers)):
        raise TypeError('sum adds numbers only')
    return sum(numbers, start)


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    too_long = isinstance(value, str) and len(value) > MAX_BITS
    number = 0 if too_long else FILTERS['int'](value, default, base)
    if too_long or (isinstance(number, int) and number.bit_length() > MAX_BITS):
        raise SecurityError(f'integers have at most {MAX_BITS} bits')
    return number


def tojson(value: Any, ensure_ascii: bool = False, indent: int | str | None = None, separators: Any = None,
           sort_keys: bool = False) -> str:
    """JSON as models' templates expect it: no HTML escapes, and non-ASCII text kept unless asked otherwise.

    Stand-ins (private-use characters, see :mod:`lmdeploy.chat.trust`) are never escaped, so that they are found again.
    """
    budget = current()
    budget.spend(budget.tree(value))
    if indent is not None:
        _check_width(indent)
        budget.spend(_lines(value) * (indent if isinstance(indent, int) else len(indent)))
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return NOT_STAND_INS.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


def _lines(value: Any, depth: int = 1) -> int:
    """An upper bound of how many indents the JSON of a value has."""
    if not isinstance(value, (list, tuple, dict)):
        return depth
    items = value.values() if isinstance(value, dict) else value
    return depth + sum(_lines(item, depth + 1) for item in items)


class SafeNamespace(Namespace):
    """``namespace(...)`` without names that Python gives a meaning to."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805 (a template may name a value "self")
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:  # not its values: they may refer to each other
        return '<namespace>'


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith('_'):
        raise SecurityError(f'a namespace has no value named {name!r}')


def bounded_range(*args: int) -> range:
    """``range`` of at most 100,000 numbers."""
    numbers = range(*args)
    if (numbers.stop - numbers.start) // numbers.step > MAX_RANGE:  # len() overflows for very long ones
        raise SecurityError(f'range gives at most {MAX_RANGE:,} numbers')
    return numbers


def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """``dict(...)``."""
    return dict(*args, **kwargs)


def raise_exception(message: Any = '') -> None:
    """How a template refuses a conversation."""
    raise Refused(str(message)[:1000])


def strftime_now(format: Any) -> str:
    """The local time in a format of ``strftime``."""
    if not isinstance(format, str) or len(format) > 64 or re.search(r'%[^a-zA-Z%]*\d', format):
        raise TemplateRuntimeError('strftime_now takes a format of at most 64 characters, without widths')
    return datetime.now().strftime(format)

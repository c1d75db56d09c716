"""Typed reads of a model's config.json: every field is checked for type and range, and errors name field and value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lmdeploy.errors import ConfigError

MISSING: Any = object()


def shown(value: object) -> str:
    """``value`` as messages show it, cut to 80 characters."""
    return f'{value!r:.80}'


class Fields:
    """One object of a config.json. ``path`` is where it lies, for messages (``'rope_scaling.'``).

    Every read takes the name of a field and a default; without a default the field is required. A field that is null
    counts as missing.
    """

    __slots__ = ('path', 'values')

    def __init__(self, values: object, path: str = '') -> None:
        if not isinstance(values, Mapping):
            raise ConfigError('LMD-117', given=type(values).__name__)
        self.values = values
        self.path = path

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def raw(self, name: str) -> Any:
        """The unchecked value, None where missing."""
        return self.values.get(name)

    def bad(self, name: str, wanted: str) -> ConfigError:
        """The error for a field whose value is not ``wanted``."""
        return ConfigError('LMD-113', field=self.path + name, value=shown(self.raw(name)), wanted=wanted)

    def whole(self, name: str, least: int, most: int, default: Any = MISSING) -> Any:
        """A whole number from ``least`` to ``most``; 4.0 counts as 4."""
        wanted = f'a whole number from {least} to {most}'
        value = self._get(name, wanted, default)
        if value is default:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.bad(name, wanted)
        return value

    def number(self, name: str, least: float, most: float, default: Any = MISSING) -> Any:
        """A finite number above ``least`` and up to ``most``."""
        wanted = f'a number above {least:g}, up to {most:g}'
        value = self._get(name, wanted, default)
        if value is default:
            return value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least < value <= most:
            raise self.bad(name, wanted)
        return float(value)

    def flag(self, name: str, default: Any = MISSING) -> Any:
        value = self._get(name, 'true or false', default)
        if value is not default and not isinstance(value, bool):
            raise self.bad(name, 'true or false')
        return value

    def text(self, name: str, default: Any = MISSING) -> Any:
        value = self._get(name, 'a text', default)
        if value is not default and not isinstance(value, str):
            raise self.bad(name, 'a text')
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """A token id, a list of them or nothing; ids outside of the vocabulary are dropped: no token can be one."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > 1024 or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self.bad(name, 'a token id or a list of them')
        return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab_size))

    def object(self, name: str) -> Fields | None:
        """A nested object, None where missing."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.bad(name, 'an object of named fields')
        return Fields(value, f'{self.path}{name}.')

    def floats(self, name: str, count: int) -> tuple[float, ...]:
        """A list of ``count`` positive finite numbers."""
        wanted = f'a list of {count} positive numbers'
        value = self._get(name, wanted, MISSING)
        if not isinstance(value, list) or len(value) != count:
            raise self.bad(name, wanted)
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < math.inf for v in value):
            raise self.bad(name, wanted)
        return tuple(float(v) for v in value)

    def _get(self, name: str, wanted: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is MISSING:
            raise ConfigError('LMD-112', field=self.path + name, wanted=wanted)
        return default

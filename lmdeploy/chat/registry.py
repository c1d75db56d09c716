"""The registry of chat templates: names to classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class Registry:
    """Maps names to classes (or factories), in the order of registration.

    Args:
        name: what is registered here; shown in messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.module_dict: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """The class registered under ``name``, or None."""
        return self.module_dict.get(name)

    def register_module(self, name: str | Iterable[str] | None = None, force: bool = False,
                        module: Any = None) -> Any:
        """Register a class under one or several names; a decorator if ``module`` is None.

        Args:
            name: the name or names; None takes the class's own.
            force: replace what is registered under the name already.
            module: the class, unless this is used as a decorator.

        Raises:
            KeyError: the name is taken and ``force`` is False.
            TypeError: what is registered, or a name, has the wrong type.
        """
        if not isinstance(force, bool):
            raise TypeError(f'force must be a bool, not {type(force).__name__}')
        names: list[str | None] = [name] if name is None or isinstance(name, str) else list(name)
        if any(n is not None and not isinstance(n, str) for n in names):
            raise TypeError('a name must be a str, or a list of them')
        if module is not None:
            self._add(module, names, force)
            return module

        def decorate(cls: Any) -> Any:
            self._add(cls, names, force)
            return cls

        return decorate

    def _add(self, module: Callable[..., Any], names: list[str | None], force: bool) -> None:
        if not callable(module):
            raise TypeError(f'a class or function must be registered, not {type(module).__name__}')
        wanted = [module.__name__ if n is None else n for n in names]
        for name in wanted:
            if not force and name in self.module_dict:
                home = getattr(self.module_dict[name], '__module__', 'this process')
                raise KeyError(f'{name} is already registered in {self.name} at {home}')
        for name in wanted:
            self.module_dict[name] = module

    def __contains__(self, name: object) -> bool:
        return name in self.module_dict

    def __len__(self) -> int:
        return len(self.module_dict)

    def __repr__(self) -> str:
        rows = '\n'.join(f'  {name}: {module.__module__}.{module.__qualname__}'
                         for name, module in self.module_dict.items())
        return f'Registry of {self.name} ({len(self)} names)\n{rows}'


MODELS = Registry('model')
"""Chat templates by name. Register your own with ``@MODELS.register_module(name='...')``."""

"""The op table: an op is one contract, one torch reference and any number of fast implementations.

The decorated function is the contract (its docstring) and the reference: the fallback on every device and the oracle of
every test. Implementations are ordered candidates, the newest registration first and those of this package after all
others; the first whose ``when`` gives no reason against it runs. Anyone may add one, see :mod:`lmdeploy.extend`::

    @rms_norm.impl('cpu', when=lambda case: [] if case.dtype is torch.float32 else ['float32 only'])
    def my_rms_norm(x, weight, eps): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lmdeploy.ops import plugins

# where a device's own implementations live; imported when first asked for
_PACKAGES = {'cpu': 'lmdeploy.ops.cpu', 'cuda': 'lmdeploy.ops.triton'}
_loaded: set[str] = set()
_ops: dict[str, Op] = {}


@dataclass(frozen=True, slots=True)
class OpCase:
    """What a choice may depend on: the device type and the dtype of the op's first tensor."""

    device: str
    dtype: torch.dtype


When = Callable[[OpCase], list[str]]


@dataclass(frozen=True, slots=True)
class Implementation:
    """One candidate. ``when(case)`` lists the reasons against it."""

    name: str
    device: str
    run: Callable[..., Any]
    when: When

    @property
    def ours(self) -> bool:
        return self.name.startswith('lmdeploy.')

    def refuse(self, case: OpCase) -> list[str]:
        if case.device != self.device:
            return [f'runs on {self.device}, not on {case.device}']
        return self.when(case)


class Op:
    """A contract with its candidates; calling it runs the best one for the first argument's device and dtype."""

    def __init__(self, reference: Callable[..., Any]) -> None:
        self.name = reference.__name__
        self.__doc__ = reference.__doc__
        self.reference = reference
        self.candidates: list[Implementation] = []
        self._chosen: dict[tuple[str, torch.dtype], Callable[..., Any]] = {}

    def __call__(self, x: Tensor, *args: Any) -> Any:
        key = (x.device.type, x.dtype)
        run = self._chosen.get(key)
        if run is None:
            run = self._chosen[key] = self.select(OpCase(*key))
        return run(x, *args)

    def impl(self, device: str, when: When = lambda case: []) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: register an implementation for ``device`` in front of the present ones.

        Those of this package are imported when they are first needed, so they stay behind whatever is there already.
        """

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            made = Implementation(f'{run.__module__}.{run.__name__}', device, run, when)
            self.candidates.insert(sum(not c.ours for c in self.candidates) if made.ours else 0, made)
            self._chosen.clear()
            return run

        return register

    def withdraw(self, run: Callable[..., Any]) -> None:
        """Take an implementation out again."""
        self.candidates = [c for c in self.candidates if c.run is not run]
        self._chosen.clear()

    def select(self, case: OpCase) -> Callable[..., Any]:
        """The first candidate without a reason against it, else the reference."""
        _load(case.device)
        return next((c.run for c in self.candidates if not c.refuse(case)), self.reference)

    def chosen(self, case: OpCase) -> str:
        """The name of what :meth:`select` takes."""
        run = self.select(case)
        return next((c.name for c in self.candidates if c.run is run), 'reference')

    def falls_back(self, case: OpCase) -> bool:
        """Whether no implementation takes ``case``, so that the reference runs."""
        return self.select(case) is self.reference

    def explain(self, case: OpCase) -> str:
        """One line per candidate: chosen, ready, or the reasons against it."""
        _load(case.device)
        chosen, lines = False, []
        for candidate in self.candidates:
            reasons = candidate.refuse(case)
            state = '; '.join(reasons) if reasons else 'ready' if chosen else 'chosen'
            chosen = chosen or not reasons
            lines.append(f'{self.name}: {candidate.name}: {state}')
        lines.append(f'{self.name}: reference: {"ready" if chosen else "chosen"}')
        return '\n'.join(lines)


def op(reference: Callable[..., Any]) -> Op:
    """Make the torch reference ``reference`` an op; its name is the function's."""
    made = Op(reference)
    _ops[made.name] = made
    return made


def registered(device: str) -> dict[str, Op]:
    """All ops that have been imported, by name, with the implementations for ``device``."""
    _load(device)
    return dict(_ops)


def _load(device: str) -> None:
    if device in _PACKAGES and device not in _loaded:
        _loaded.add(device)
        try:
            import_module(_PACKAGES[device])
        except ModuleNotFoundError as error:
            if error.name != 'triton':  # torch comes without it on some platforms: the references run there
                raise
    plugins.load()

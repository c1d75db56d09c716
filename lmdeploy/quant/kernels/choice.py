"""The candidates, in order, and the choice among them: the first without a reason against it is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from lmdeploy.errors import ConfigError
from lmdeploy.ops import plugins
from lmdeploy.quant.kernels.base import GatedKernel, KernelCase, LinearKernel

K = TypeVar('K', LinearKernel, GatedKernel)

LINEAR: list[LinearKernel] = []  # filled by the package
GATED: list[GatedKernel] = []


def register_linear(kernel: LinearKernel) -> LinearKernel:
    """Put ``kernel`` before all present ones for linear layers."""
    LINEAR.insert(0, kernel)
    return kernel


def register_gated(kernel: GatedKernel) -> GatedKernel:
    """Put ``kernel`` before all present ones for the two gated layers of an MLP."""
    GATED.insert(0, kernel)
    return kernel


def withdraw(kernel: LinearKernel | GatedKernel) -> None:
    """Take a kernel out of the candidates."""
    LINEAR[:] = [one for one in LINEAR if one is not kernel]
    GATED[:] = [one for one in GATED if one is not kernel]


def explain(case: KernelCase) -> str:
    """One line per kernel, those of linear layers and then those of gated ones: chosen, ready, or reasons against."""
    return '\n'.join((*_states('linear layer', LINEAR, case), *_states('gated layers', GATED, case)))


def _states(kind: str, kernels: Sequence[K], case: KernelCase) -> Iterator[str]:
    plugins.load()
    chosen = False
    for kernel in kernels:
        against = kernel.refuse(case)
        yield f'{kind}: {kernel.name}: {"; ".join(against) if against else "ready" if chosen else "chosen"}'
        chosen = chosen or not against


def choose_kernel(case: KernelCase) -> LinearKernel:
    """The first kernel of a linear layer that does not refuse.

    Raises:
        ConfigError: LMD-118, with every candidate's reasons.
    """
    return _choose(LINEAR, case)


def choose_gated(case: KernelCase) -> GatedKernel:
    """The first kernel of the two gated layers of an MLP that does not refuse; as :func:`choose_kernel`."""
    return _choose(GATED, case)


def _choose(kernels: Sequence[K], case: KernelCase) -> K:
    plugins.load()
    reasons = []
    for kernel in kernels:
        against = kernel.refuse(case)
        if not against:
            return kernel
        reasons.append(f'{kernel.name}: {", ".join(against)}')
    raise ConfigError('LMD-118', scheme=case.scheme.name, device=case.device, reasons='; '.join(reasons))

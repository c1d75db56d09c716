"""QuantScheme: what the numbers of a linear layer's weight are, whatever file they came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How a weight is quantised. Kernels are chosen by it, so it says nothing of how a file packs the codes.

    Attributes:
        name: the storage family: ``'dense'``, ``'awq'``, ``'gptq'``, ``'w8a8_int8'``, a GGUF block type such as
            ``'Q4_K'``, ...
        bits: bits of one code; of one element for a dense weight (16 or 32).
        group: input channels that share one scale; 0 means all of them (one scale per output channel, or none).
        symmetric: no zero points (and no minima).
        activation: ``''`` for floating-point inputs, else the type that inputs are quantised to, such as ``'int8'``.
    """

    name: str
    bits: int
    group: int = 0
    symmetric: bool = True
    activation: str = ''

    @property
    def dense(self) -> bool:
        """The weight is stored as plain floating-point numbers."""
        return self.name == 'dense'


def dense_scheme(bits: int) -> QuantScheme:
    """The scheme of an unquantised weight whose elements have ``bits`` bits."""
    return QuantScheme('dense', bits)

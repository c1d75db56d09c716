"""QuantScheme: what the numbers of a linear layer's weight are, whatever file they came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How a weight is quantised. Kernels are chosen by it, so it says nothing of how a file packs the codes.

    Attributes:
        name: what a code is: ``'dense'``, ``'int'``, ``'float8_e4m3fn'``, ``'float8_e5m2'``, or a GGUF block type such
            as ``'Q4_K'``.
        bits: bits of one code; of one element for a dense weight (16 or 32).
        group: input channels that share one scale; 0 means all of them (one scale per output channel, or none).
        symmetric: no zero points (and no minima).
        activation: ``''`` for floating-point inputs, else what they are quantised to, token by token: ``'int8'``,
            ``'float8_e4m3fn'``, ``'float8_e5m2'``.
        activation_group: input channels of a token that share one scale; 0 means all of them.
        static: all inputs share one scale, which comes with the layer.
    """

    name: str
    bits: int
    group: int = 0
    symmetric: bool = True
    activation: str = ''
    activation_group: int = 0
    static: bool = False

    @property
    def dense(self) -> bool:
        """The weight is stored as plain floating-point numbers."""
        return self.name == 'dense'

    @property
    def weight_bits(self) -> float:
        """Bits of one weight with its part of the scales, in 16 bits, and of the zero points, of codes with scales."""
        shared = 16 + (0 if self.symmetric else self.bits)
        return self.bits + (shared / self.group if self.group else 0.0)

    def __str__(self) -> str:
        """As messages show it: ``int4 in groups of 128, asymmetric``."""
        parts = [f'int{self.bits}' if self.name == 'int' else self.name]
        parts[0] += f' in groups of {self.group}' if self.group and self.name in ('int', *FLOAT8) else ''
        if not self.symmetric:
            parts.append('asymmetric')
        if self.activation:
            parts.append(f'with inputs in {self.activation}{" by a stored scale" if self.static else ""}')
        return ', '.join(parts)


FLOAT8 = ('float8_e4m3fn', 'float8_e5m2')


def dense_scheme(bits: int) -> QuantScheme:
    """The scheme of an unquantised weight whose elements have ``bits`` bits."""
    return QuantScheme('dense', bits)

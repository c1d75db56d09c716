"""Quantising a layer's inputs: codes and scales of every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmdeploy.ops.activation import ACTIVATIONS
from lmdeploy.ops.linear import GATE_GROUP
from lmdeploy.ops.norm import add_rms_norm, rms_norm
from lmdeploy.ops.table import op

# channels of 16 in the order in which a thread of a GPU holds the codes of a weight that is packed for 16-bit inputs
TURN = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
INT8_EPS = 1e-7  # the smallest magnitude that a token's largest counts as
FLOAT8_FLOOR = 1 / 512  # of float8: the same, in units of the largest code
LARGEST = {'int8': 127.0, 'float8_e4m3fn': 448.0, 'float8_e5m2': 57344.0}
TYPES = {'int8': torch.int8, 'float8_e4m3fn': torch.float8_e4m3fn, 'float8_e5m2': torch.float8_e5m2}


class TokenCodes(NamedTuple):
    """A layer's inputs, quantised by :func:`quantize_tokens`: codes ``[T, in]``, scales ``[T, groups] float32``."""

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class CodesOf:
    """How a layer wants more than ``above`` tokens quantised: the arguments of :func:`quantize_tokens`."""

    kind: str
    group: int
    turned: bool = False
    above: int = 0


@op
def quantize_tokens(x: Tensor, kind: str, group: int, turned: bool = False) -> tuple[Tensor, Tensor]:
    """Symmetric codes of every token, with a scale of its own: ``x = codes * scales`` about.

    The largest magnitude of a token (or of each group of its channels) becomes the largest code: 127 of int8, 448 or
    57344 of float8. Codes are rounded to the nearest, ties to even; all of it is done in float32.

    Args:
        x: ``[T, in]``. kind: a key of LARGEST. group: channels that share a scale, the last may be fewer; 0: all.
        turned: give the codes of every 16 channels, of which there are whole ones, in the order TURN.

    Returns:
        codes ``[T, in]`` of the type named by kind, scales ``[T, groups] float32``.
    """
    tokens, channels = x.shape
    group = group or channels
    groups = -(-channels // group)
    padded = torch.nn.functional.pad(x.float(), (0, groups * group - channels)).view(tokens, groups, group)
    largest = LARGEST[kind]
    least = INT8_EPS if kind == 'int8' else FLOAT8_FLOOR
    scales = padded.abs().amax(-1).clamp_(min=least) / largest
    scaled = (padded / scales.unsqueeze(-1)).flatten(1)[:, :channels]
    codes = _codes(scaled, kind)
    return (turn(codes) if turned else codes), scales


def turn(codes: Tensor) -> Tensor:
    """Every 16 channels of ``[..., in]`` in the order TURN."""
    return codes.view(torch.uint8).unflatten(-1, (-1, 16))[..., list(TURN)].flatten(-2).view(codes.dtype)


@op
def quantize_static(x: Tensor, kind: str, scale: Tensor) -> Tensor:
    """As :func:`quantize_tokens`, with one given ``scale []`` for all: codes ``[T, in]``; what is too large is cut."""
    return _codes(x.float() / scale.float(), kind)


@op
def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, kind: str, group: int,
                      turned: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``quantize_tokens(rms_norm(x, weight, eps), kind, group, turned)`` for ``x [T, D]``."""
    return quantize_tokens(rms_norm(x, weight, eps), kind, group, turned)


@op
def add_rms_norm_quantize(x: Tensor, residual: Tensor, weight: Tensor, eps: float, kind: str, group: int,
                          turned: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``s = x + residual``; returns the codes and scales of ``rms_norm(s, weight, eps)``, and s; all ``[T, ...]``."""
    normalised, total = add_rms_norm(x, residual, weight, eps)
    return *quantize_tokens(normalised, kind, group, turned), total


@op
def gate_mul_quantize(x: Tensor, activation: str, interleaved: bool, kind: str, group: int,
                      turned: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``quantize_tokens(activation(gate) * up, kind, group, turned)``.

    Args:
        x: ``[T, 2 I]``: gate and up, one after the other or in turns of GATE_GROUP channels where ``interleaved``.
        activation: a key of ``ACTIVATIONS``.
    """
    if interleaved:
        both = x.unflatten(-1, (-1, 2, GATE_GROUP))
        x = torch.cat((both[..., 0, :].flatten(-2), both[..., 1, :].flatten(-2)), -1)
    return quantize_tokens(ACTIVATIONS[activation](x), kind, group, turned)


def _codes(scaled: Tensor, kind: str) -> Tensor:
    limit = LARGEST[kind]
    scaled = scaled.round() if kind == 'int8' else scaled
    return scaled.clamp(-limit, limit).to(TYPES[kind])  # float8 has no infinity: beyond its largest is NaN

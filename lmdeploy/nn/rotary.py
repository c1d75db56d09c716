"""Rotary: from positions to the cosines and sines of every rope type.

The frequencies follow the papers (Su et al. 2021; bloc97's dynamic NTK; Peng et al. 2023, YaRN) and Llama 3.1's blend,
in the arithmetic that Hugging Face checkpoints were made with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmdeploy.config.rope import RopeConfig
from lmdeploy.ops.rope import rope_tables


def inverse_frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    """``([rotary_dim / 2] float32 in radians per token, the factor of cosines and sines)``."""
    kind = config.rope_type
    if kind == 'dynamic':
        return _frequencies(dynamic_theta(config), config.rotary_dim), 1.0
    plain = _frequencies(config.theta, config.rotary_dim)
    if kind == 'linear':
        return plain / config.factor, 1.0
    if kind == 'frequency_factors':
        return plain / torch.tensor(config.factors), 1.0
    if kind == 'llama3':
        return _llama3(config, plain), 1.0
    if kind == 'yarn':
        return _yarn(config), _yarn_attention_factor(config)
    return plain, 1.0


def dynamic_theta(config: RopeConfig) -> float:
    """The base of a dynamic rope that serves ``config.length`` tokens: the original one inside the original window."""
    if config.length <= config.original:
        return config.theta
    stretch = config.factor * config.length / config.original - (config.factor - 1)
    return config.theta * stretch ** (config.rotary_dim / (config.rotary_dim - 2))


class Rotary:
    """Angles of one rope on one device.

    Where the rope has sections, positions may have three rows: the first ``sections[0]`` frequencies turn with the
    first row, and so on (Qwen2-VL's M-RoPE, Wang et al. 2024).
    """

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        frequencies, self.factor = inverse_frequencies(config)
        self.frequencies, self.sections = frequencies.to(device), config.sections
        rows = torch.tensor(config.sections or (self.frequencies.numel(), 0, 0))
        self.row = torch.arange(3).repeat_interleave(rows).to(device)  # of positions, for each frequency

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The tables of :func:`lmdeploy.ops.rope.rope` for ``positions [T]`` or ``[3, T] int32``.

        Returns:
            Two ``[T, 1, rotary_dim] float32``.
        """
        if positions.dim() == 2:
            return _turned(positions.float()[self.row].t()[:, None] * self.frequencies, self.factor)
        return rope_tables(positions, self.frequencies, self.factor)


def _turned(angles: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The tables of ``angles [T, 1, R / 2]``."""
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _frequencies(theta: float, dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, and those between blended."""
    wavelengths = 2 * math.pi / plain
    turns = config.original / wavelengths
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blended = (1 - blend) * plain / config.factor + blend * plain
    stretched = torch.where(turns < config.low_freq_factor, plain / config.factor, plain)
    between = (turns >= config.low_freq_factor) & (turns <= config.high_freq_factor)
    return torch.where(between, blended, stretched)


def _yarn(config: RopeConfig) -> Tensor:
    """Channels that turn often within the original context are kept, those that hardly turn are stretched."""
    dim, theta = config.rotary_dim, config.theta

    def channel(turns: float) -> float:
        return dim * math.log(config.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(config.beta_fast), channel(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp_(0, 1)
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    kept = 1 - ramp
    return 1.0 / (config.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _yarn_attention_factor(config: RopeConfig) -> float:
    def scale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.attention_factor:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)

"""Workloads: how many requests of which lengths, as token ids without text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmdeploy.engine.request import EngineInput
from lmdeploy.engine.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests by their lengths: ``inputs[i]`` prompt tokens, ``outputs[i]`` generated ones, all sent at once."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.inputs)

    def requests(self, vocab_size: int, *, seed: int = 0, tag: str = '') -> list[EngineInput]:
        """Requests of random ids: greedy, to the last token, whatever it is."""
        random = np.random.default_rng(seed)
        return [
            EngineInput(f'{tag}{i}', random.integers(0, vocab_size, length).tolist(),
                        SamplingParams(max_new_tokens=most))
            for i, (length, most) in enumerate(zip(self.inputs, self.outputs))
        ]


def fixed(requests: int, input_len: int, output_len: int) -> Workload:
    """``requests`` of the same lengths."""
    return Workload(f'{requests} x {input_len}/{output_len}', (input_len,) * requests, (output_len,) * requests)


# shares, medians and sigmas of log-normal lengths that resemble the conversations of ShareGPT
INPUTS = ((0.54, 32, 1.0), (0.46, 420, 0.75))
OUTPUTS = ((0.34, 26, 0.9), (0.66, 228, 0.65))
LEAST, MOST_INPUT, MOST_TOTAL = 4, 1024, 2048


def arrivals(requests: int, rate: float, *, seed: int = 0) -> list[float]:
    """When requests arrive, in seconds: a Poisson process of ``rate`` per second, or all at once if it is infinite."""
    if rate == float('inf'):
        return [0.0] * requests
    waits = np.random.default_rng(seed).exponential(1 / rate, requests)
    return np.cumsum(waits).tolist()


def sharegpt_like(requests: int, *, seed: int = 0) -> Workload:
    """Conversations: lengths from two mixtures, kept where ``4 <= in <= 1024``, ``4 <= out``, ``in + out <= 2048``."""
    random = np.random.default_rng(seed)
    inputs: list[int] = []
    outputs: list[int] = []
    while len(inputs) < requests:
        given, made = _mixture(random, INPUTS), _mixture(random, OUTPUTS)
        if LEAST <= given <= MOST_INPUT and LEAST <= made and given + made <= MOST_TOTAL:
            inputs.append(given)
            outputs.append(made)
    return Workload(f'{requests} x ShareGPT-like', tuple(inputs), tuple(outputs))


def _mixture(random: np.random.Generator, parts: tuple[tuple[float, float, float], ...]) -> int:
    _, median, sigma = parts[int(random.random() >= parts[0][0])]
    return int(round(median * float(np.exp(sigma * random.standard_normal()))))

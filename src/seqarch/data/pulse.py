"""A simulated finger sensor: the light that a pulse lets through (a photoplethysmogram, PPG), and its heart rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RATE", "PulseWaves", "pulse_waves"]

RATE = 31.25  # samples a second of the base recording
HEART, BREATH = (45.0, 140.0), (8.0, 25.0)  # beats and breaths a minute


@dataclass(frozen=True)
class PulseWaves:
    """The same minute fractions of N people, recorded at three rates.

    Attributes:
        base: ``(N, L, 1)`` at `RATE` samples a second.
        dense: ``(N, 2 L, 1)`` at twice that rate; ``dense[:, ::2]`` is ``base``.
        sparse: ``(N, L / 2, 1)`` at half of it, ``base[:, ::2]``.
        bpm: the heart rate, ``(N,)`` beats a minute.
    """

    base: Tensor
    dense: Tensor
    sparse: Tensor
    bpm: Tensor


def pulse_waves(count: int, seed: int = 0, length: int = 256, noise: float = 0.3) -> PulseWaves:
    r"""Simulate `count` recordings of `length` samples at `RATE`.

    Each has a heart rate, uniform between 45 and 140 beats a minute, a breathing rate between 8 and 25, and a random
    phase. The phase of the heart runs with a jitter of N(0, 0.0028²) per sample of the dense recording. A beat is two
    bumps, the pulse and its weaker echo; breathing modulates their height by 20% and moves the baseline. The noise of
    the sensor is drawn at the base rate; the dense recording has its linear interpolation.

    Raises:
        ValueError: count below 1, a length that is odd or below 4, or negative noise.
    """
    if count < 1:
        raise ValueError(f"expected count of at least 1, got {count}")
    if length < 4 or length % 2:
        raise ValueError(f"expected length to be an even number of at least 4, got {length}")
    if noise < 0:
        raise ValueError(f"expected noise of at least 0, got {noise}")
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=g)

    bpm, breaths = uniform(*HEART), uniform(*BREATH)
    t = torch.arange(2 * length) / (2 * RATE)
    jitter = (0.0028 * torch.randn(count, 2 * length, generator=g)).cumsum(1)
    phase = (uniform(0, 1) + bpm / 60 * t + jitter) % 1
    breathing = torch.sin(2 * math.pi * (uniform(0, 1) + breaths / 60 * t))
    beat = torch.exp(-(((phase - 0.25) / 0.09) ** 2) / 2) + 0.45 * torch.exp(-(((phase - 0.55) / 0.11) ** 2) / 2)
    clean = beat * (1 + 0.2 * breathing) + 0.5 * breathing

    coarse = noise * torch.randn(count, length, generator=g)
    following = torch.cat([coarse[:, 1:], coarse[:, -1:]], dim=1)
    dense = clean + torch.stack([coarse, (coarse + following) / 2], dim=2).flatten(1)
    dense = dense[..., None]
    return PulseWaves(dense[:, ::2].contiguous(), dense, dense[:, ::4].contiguous(), bpm[:, 0])

"""Evidence that lies at the far end of a long sequence: nothing near the read-out helps (chapter 08)."""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES = 8


def far_evidence(batch: int, length: int, generator: torch.Generator, strength: float = 0.7) -> tuple[Tensor, Tensor]:
    """Return noise whose mean, in three pieces at its beginning, spells out a class.

    Each of the first three twelfths of a sequence (rounded down to whole steps) is shifted up or down by `strength`: up
    where bit j of the class is 1. The other three quarters are noise of mean 0, so whoever is asked at the last step has
    to remember averages from long ago.

    Args:
        batch, length: how many sequences, and how long.
        generator: seeded source of randomness.
        strength: the shift, in standard deviations of the noise.

    Returns:
        x ``(batch, length, 1)`` and the classes y ``(batch,)``, uniform in 0..7.

    Raises:
        ValueError: batch below 1 or length below 12.
    """
    if batch < 1 or length < 12:
        raise ValueError(f"expected batch >= 1 and length >= 12, got batch={batch} and length={length}")
    y = torch.randint(CLASSES, (batch,), generator=generator)
    x = torch.randn(batch, length, 1, generator=generator)
    piece = length // 12
    signs = 2 * (y[:, None] >> torch.arange(3) & 1) - 1  # (batch, 3)
    x[:, : 3 * piece, 0] += strength * signs.repeat_interleave(piece, dim=1)
    return x, y

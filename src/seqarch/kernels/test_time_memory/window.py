"""What a window of tokens needs from before the first one. Shared by the definition and the chunked form."""

from __future__ import annotations

import torch
from torch import Tensor

Tail = tuple[Tensor, Tensor, Tensor]


def with_tail(tail: Tail, k: Tensor, v: Tensor, weight: Tensor) -> Tail:
    """Put the tokens of the tail in front: ``(R, window - 1 + T, ...)`` each."""
    return tuple(torch.cat(pair, dim=1) for pair in zip(tail, (k, v, weight), strict=True))


def next_tail(tail: Tail, k: Tensor, v: Tensor, weight: Tensor) -> Tail:
    """The tail of whatever follows these tokens: as many of the last ones as the tail has."""
    n = tail[0].shape[1]
    return tuple(x[:, x.shape[1] - n :] for x in with_tail(tail, k, v, weight))

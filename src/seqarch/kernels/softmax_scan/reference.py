"""The definition of the softmax scan: a loop over time. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse(u: Tensor) -> Tensor:
    """Return 1 / u, and 0 where u is 0: nothing has been seen yet, and the output is 0."""
    return torch.where(u > 0, 1 / torch.where(u > 0, u, 1.0), 0.0)


def softmax_scan_reference(s: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Walk along T one token at a time; autograd gives the gradients.

    Rows are flattened: s ``(R, T)``, v ``(R, T, E)``, state m ``(R,)``, u ``(R,)``, w ``(R, E)``, all of one dtype.
    """
    outputs = []
    # unbind, not s[:, t]: the backward of each slice would fill a zero tensor of the whole length, O(T^2) in all
    for score, value in zip(s.unbind(1), v.unbind(1), strict=True):
        o, (m, u, w) = absorb(score, value, m, u, w)
        outputs.append(o)
    return (torch.stack(outputs, dim=1) if outputs else v.clone()), m, u, w


def absorb(score: Tensor, value: Tensor, m: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Absorb one token, score ``(...)`` and value ``(..., E)``, into the state; return its output and the new state.

    The maximum only keeps the numbers in range: the output does not depend on it, so no gradient passes through it.
    """
    top = torch.maximum(m, score).detach()
    safe = torch.where(top == -torch.inf, torch.inf, top)  # so that exp(-inf - safe) is 0 and never nan
    old, new = torch.exp(m - safe), torch.exp(score - safe)
    u = u * old + new
    w = w * old[..., None] + value * new[..., None]
    return w * inverse(u)[..., None], (top, u, w)

"""The definition of the scalar-decay state-space recurrence: a loop over time. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_heads(grouped: Tensor, H: int) -> Tensor:
    """Repeat the vectors of each group for the heads that share it: ``(..., G, N)`` to ``(..., H, N)``."""
    return grouped.repeat_interleave(H // grouped.shape[-2], dim=-2)


def absorb(x: Tensor, w: Tensor, a: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One token: forget, insert, read. Return the output ``(B, H, P)`` without the skip term, and the new state.

    x ``(B, H, P)``, w and a ``(B, H)``, B and C ``(B, H, N)``, h ``(B, H, N, P)``.
    """
    h = torch.exp(a)[..., None, None] * h + B[..., :, None] * (w[..., None] * x)[..., None, :]
    return (C[..., None, :] @ h).squeeze(-2), h


def ssd_reference(x: Tensor, w: Tensor, a: Tensor, B: Tensor, C: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Walk along T one token at a time; autograd gives the gradients.

    x ``(B, T, H, P)``; w, the factor of what is inserted, and a, the log of the decay, ``(B, T, H)``; B and C
    ``(B, T, G, N)``; h0 ``(B, H, N, P)``; all of one dtype. Return y without the skip term, and the final state.
    """
    H, outputs, h = x.shape[2], [], h0
    # unbind, not x[:, t]: the backward of each slice would fill a zero tensor of the whole length, O(T^2) in all
    for token in zip(*(z.unbind(1) for z in (x, w, a, to_heads(B, H), to_heads(C, H))), strict=True):
        y, h = absorb(*token, h)
        outputs.append(y)
    return (torch.stack(outputs, dim=1) if outputs else x.clone()), h


def segment_sums(a: Tensor) -> Tensor:
    r"""Exponents of the decay from token s to token t, $\sum_{s < j \le t} a_j$: ``(..., T)`` to ``(..., T, T)``.

    Above the diagonal, where t < s, the entry is -inf, so that its exponential is 0. Masking must come before the
    exponential: the difference of sums is positive there and could overflow, and inf times 0 is nan in the gradient.
    The sums run in double precision, because a difference of two long float32 sums has lost the small decays in it.
    """
    c = a.double().cumsum(-1)
    future = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).triu(1)
    return (c[..., :, None] - c[..., None, :]).masked_fill(future, -torch.inf).to(a.dtype)


def ssd_windowed(
    x: Tensor, w: Tensor, a: Tensor, B: Tensor, C: Tensor, h0: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    r"""The dual form: one masked T x T matrix per head, in which only the last `window` tokens take part.

    $$y_t = \sum_{t - r < s \le t} e^{a_{s+1} + \dots + a_t}\, (C_t^\top B_s)\, w_s x_s ,$$

    which is the recurrence with all older tokens removed from its state. Shapes as in `ssd_reference`; h0 only lends its
    shape and dtype. Memory grows with T squared.
    """
    T, H = x.shape[1:3]
    X, B, C = (z.transpose(1, 2) for z in (w[..., None] * x, to_heads(B, H), to_heads(C, H)))
    too_old = torch.ones(T, T, dtype=torch.bool, device=x.device).tril(-window)
    decay = segment_sums(a.transpose(1, 2)).masked_fill(too_old, -torch.inf).exp()
    y = (decay * (C @ B.transpose(2, 3))) @ X
    if T == 0:
        return y.transpose(1, 2), torch.zeros_like(h0)
    return y.transpose(1, 2), (decay[:, :, -1, :, None] * B).transpose(2, 3) @ X

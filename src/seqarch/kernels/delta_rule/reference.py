"""The definition of the delta rule: a loop over time. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor


def delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, S: Tensor
) -> tuple[Tensor, Tensor]:
    """Walk along T one token at a time; autograd gives the gradients.

    Rows are flattened: q and k ``(R, T, K)``, v ``(R, T, V)``, beta and log_decay ``(R, T)``, S ``(R, K, V)``, all of one
    dtype.
    """
    T = q.shape[1]
    # unbind, not q[:, t]: the backward of each slice would fill a zero tensor of the whole length, O(T^2) in all
    alphas = [None] * T if log_decay is None else log_decay.exp().unbind(1)
    outputs = []
    for token in zip(q.unbind(1), k.unbind(1), v.unbind(1), beta.unbind(1), alphas, strict=True):
        o, S = absorb(*token, S)
        outputs.append(o)
    return (torch.stack(outputs, dim=1) if outputs else v.clone()), S


def absorb(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """Decay the memory S ``(..., K, V)``, correct what it holds under k, read it with q; return o and the new S."""
    if alpha is not None:
        S = alpha[..., None, None] * S
    e = v - (k[..., None, :] @ S)[..., 0, :]
    S = S + (beta[..., None] * k)[..., :, None] * e[..., None, :]
    return (q[..., None, :] @ S)[..., 0, :], S

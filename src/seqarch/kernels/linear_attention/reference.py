"""The definition of linear attention: a loop over time. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor


def elu_features(x: Tensor) -> Tensor:
    """Return 1 + elu(x), entry by entry: 1 + x where x is positive, e^x where it is not; always positive. ``(..., D)``."""
    return torch.nn.functional.elu(x) + 1


def taylor_features(x: Tensor) -> Tensor:
    r"""Return $[1,\ x / D^{1/4},\ \mathrm{vec}(x x^\top) / \sqrt{2 D}]$, ``(..., D)`` to ``(..., 1 + D + D^2)``.

    With $s = \langle q, k\rangle / \sqrt D$ the features of q and k have the product $1 + s + s^2/2$: the exponential of
    softmax attention up to second order, and never below 1/2.
    """
    D = x.shape[-1]
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x * D**-0.25, pairs * (2 * D) ** -0.5], dim=-1)


FEATURES = {None: lambda x: x, "elu": elu_features, "taylor": taylor_features}


def inverse(z: Tensor, eps: float) -> Tensor:
    """Return 1 / z, with \\|z\\| raised to eps where it is smaller, and 0 where z is 0: nothing has been seen yet."""
    return z.sign() / z.abs().clamp(min=eps)


def absorb(q: Tensor, k: Tensor, v: Tensor, S: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Absorb one token, features q, k ``(..., F)`` and value v ``(..., E)``, into the state S ``(..., F, E)``.

    log_decay is ``(..., W)``: W = F fades every row of S at its own rate, W = 1 all rows alike, W = 0 none. Return the
    output of the token and the new state.
    """
    if log_decay.shape[-1]:
        S = S * log_decay.exp()[..., None]
    S = S + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ S).squeeze(-2), S


def linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor, log_decay: Tensor, features: str | None
) -> tuple[Tensor, Tensor]:
    """Walk along T one token at a time; autograd gives the gradients.

    Rows are flattened: q, k ``(R, T, D)``, v ``(R, T, E)``, S ``(R, F, E)``, log_decay ``(R, T, W)``, all of one dtype.
    """
    q, k = FEATURES[features](q), FEATURES[features](k)
    outputs = []
    # unbind, not q[:, t]: the backward of each slice would fill a zero tensor of the whole length, O(T^2) in all
    for token in zip(q.unbind(1), k.unbind(1), v.unbind(1), log_decay.unbind(1), strict=True):
        o, S = absorb(*token[:3], S, token[3])
        outputs.append(o)
    return (torch.stack(outputs, dim=1) if outputs else v.clone()), S

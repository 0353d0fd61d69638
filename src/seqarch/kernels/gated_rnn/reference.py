r"""The definition of the three recurrent cells: one step each, and a loop over time. Everything else is measured
against it.

All take the input part of the pre-activations ready-made, `xp` $= x W_x^\top + b$: it does not depend on the state, so
it is one matrix product for all steps, done before the loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype


def rnn_step(xp: Tensor, w_h: Tensor, h: Tensor, activation: str = "tanh") -> Tensor:
    r"""One Elman step, $h' = \phi(x_p + h W_h^\top)$: xp ``(B, H)``, w_h ``(H, H)``, h ``(B, H)`` -> ``(B, H)``."""
    a = xp + h @ w_h.T
    return torch.tanh(a) if activation == "tanh" else torch.relu(a)


def lstm_step(xp: Tensor, w_h: Tensor, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    r"""One LSTM step: xp ``(B, 4H)``, w_h ``(4H, H)``, h and s ``(B, H)`` -> the new h and s.

    The blocks stand in the order i, f, g, o: $s' = f \odot s + i \odot g$ and $h' = o \odot \tanh s'$.
    """
    i, f, g, o = (xp + h @ w_h.T).chunk(4, dim=-1)
    s = torch.sigmoid(f) * s + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(s), s


def gru_step(xp: Tensor, w_h: Tensor, b_h: Tensor, h: Tensor) -> Tensor:
    r"""One GRU step: xp ``(B, 3H)``, w_h ``(3H, H)``, b_h ``(3H,)``, h ``(B, H)`` -> ``(B, H)``.

    The blocks stand in the order r, z, n: $n = \tanh(x_n + r \odot (h W_n^\top + b_n))$, $h' = (1-z) \odot n + z \odot h$.
    """
    x_r, x_z, x_n = xp.chunk(3, dim=-1)
    q_r, q_z, q_n = (h @ w_h.T + b_h).chunk(3, dim=-1)
    r, z = torch.sigmoid(x_r + q_r), torch.sigmoid(x_z + q_z)
    n = torch.tanh(x_n + r * q_n)
    return (1 - z) * n + z * h


def _stack(states: list[Tensor], xp: Tensor, h0: Tensor) -> Tensor:
    """All states as ``(B, T, H)`` in xp's dtype, for T = 0 too."""
    return torch.stack(states, dim=1).to(xp.dtype) if states else xp.new_zeros(len(h0), 0, h0.shape[1])


def rnn_scan_reference(xp: Tensor, w_h: Tensor, h0: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Loop over `rnn_step`; shapes as in `rnn_scan`."""
    dtype = accumulate_dtype(xp.dtype)
    h, states, w_h = h0, [], w_h.to(dtype)
    for step in xp.to(dtype).unbind(1):
        h = rnn_step(step, w_h, h, activation)
        states.append(h)
    return _stack(states, xp, h0), h


def lstm_scan_reference(
    xp: Tensor, w_h: Tensor, h0: Tensor, s0: Tensor, cont: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loop over `lstm_step`; shapes as in `lstm_scan`."""
    dtype = accumulate_dtype(xp.dtype)
    h, s, states, w_h = h0, s0, [], w_h.to(dtype)
    for t, step in enumerate(xp.to(dtype).unbind(1)):
        if cont is not None:
            h, s = (torch.where(cont[:, t, None], state, 0.0) for state in (h, s))
        h, s = lstm_step(step, w_h, h, s)
        states.append(h)
    return _stack(states, xp, h0), h, s


def gru_scan_reference(xp: Tensor, w_h: Tensor, b_h: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Loop over `gru_step`; shapes as in `gru_scan`."""
    dtype = accumulate_dtype(xp.dtype)
    h, states, w_h, b_h = h0, [], w_h.to(dtype), b_h.to(dtype)
    for step in xp.to(dtype).unbind(1):
        h = gru_step(step, w_h, b_h, h)
        states.append(h)
    return _stack(states, xp, h0), h

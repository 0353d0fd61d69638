"""The definition of the two parallelisable cells: a step, and a loop over time. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype


def gru_cell(w: Tensor, a: Tensor, h: Tensor) -> Tensor:
    r"""One step of ParaGRU: w ``(..., 3, D)`` and a ``(3, D)`` in the order z, r, c; h ``(..., D)`` -> ``(..., D)``.

    $z = \sigma(a_z h + w_z)$, $r = \sigma(a_r h + w_r)$, $c = \tanh(a_c h r + w_c)$, $h' = (1-z) h + z c$, all elementwise.
    """
    w_z, w_r, w_c = w.unbind(-2)
    z, r = torch.sigmoid(a[0] * h + w_z), torch.sigmoid(a[1] * h + w_r)
    c = torch.tanh(a[2] * (h * r) + w_c)
    return (1 - z) * h + z * c


def lstm_cell(w: Tensor, a: Tensor, p: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    r"""One step of ParaLSTM: w ``(..., 3, D)`` and a ``(3, D)`` in the order f, o, z; p ``(2, D)`` = $(p_f, p_o)$.

    $f = \sigma(a_f h + p_f c + w_f)$, $z = \tanh(a_z h + w_z)$, $c' = f c + (1-f) z$, $o = \sigma(a_o h + p_o c' + w_o)$,
    $h' = o \tanh c'$, all elementwise; returns c' and h'. The output gate looks at the *new* cell.
    """
    w_f, w_o, w_z = w.unbind(-2)
    f, z = torch.sigmoid(a[0] * h + p[0] * c + w_f), torch.tanh(a[2] * h + w_z)
    c = f * c + (1 - f) * z
    o = torch.sigmoid(a[1] * h + p[1] * c + w_o)
    return c, o * torch.tanh(c)


def _stack(states: list[Tensor], w: Tensor) -> Tensor:
    """All states as ``(B, L, D)`` in w's dtype, for L = 0 too."""
    return torch.stack(states, dim=1).to(w.dtype) if states else w.new_zeros(len(w), 0, w.shape[3])


def para_gru_reference(w: Tensor, a: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Loop over `gru_cell`; autograd gives the gradients. Shapes as in `para_gru`."""
    h, states = h0, []
    # unbind, not w[:, t]: the backward of each slice would fill a zero tensor of the whole length, O(L^2) in all
    for step in w.to(accumulate_dtype(w.dtype)).unbind(1):
        h = gru_cell(step, a, h)
        states.append(h)
    return _stack(states, w), h


def para_lstm_reference(w: Tensor, a: Tensor, p: Tensor, c0: Tensor, h0: Tensor) -> tuple[Tensor, ...]:
    """Loop over `lstm_cell`; returns h, c, the last c and the last h. Shapes as in `para_lstm`."""
    c, h, cells, outputs = c0, h0, [], []
    for step in w.to(accumulate_dtype(w.dtype)).unbind(1):
        c, h = lstm_cell(step, a, p, c, h)
        cells.append(c)
        outputs.append(h)
    return _stack(outputs, w), _stack(cells, w), c, h

"""The definition of the linear time-invariant scan: a loop over time. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor


def lti_scan_reference(
    Abar: Tensor, Bbar: Tensor, C: Tensor, D: Tensor, u: Tensor, x0: Tensor
) -> tuple[Tensor, Tensor]:
    """Walk along L one step at a time; autograd gives the gradients. Shapes as in `lti_scan`, one dtype."""
    x, outputs = x0, []
    # unbind, not u[..., k]: the backward of each slice would fill a zero tensor of the whole length, O(L^2) in all
    for u_k in u.unbind(-1):
        y, x = advance(Abar, Bbar, C, D, u_k, x)
        outputs.append(y)
    if not outputs:
        return u.new_empty(u.shape[0], C.shape[1], u.shape[1], 0), x0
    return torch.stack(outputs, dim=-1), x


def advance(Abar: Tensor, Bbar: Tensor, C: Tensor, D: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """One step: u ``(B, H)`` and the state x ``(B, H, N)``; return y ``(B, M, H)`` and the new state."""
    x = torch.einsum("hnm,bhm->bhn", Abar, x) + Bbar * u[..., None]
    y = torch.einsum("hmn,bhn->bmh", C, x) + D.T * u[:, None]
    return y, x

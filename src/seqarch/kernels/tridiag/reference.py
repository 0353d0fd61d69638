"""The definition of the tridiagonal solve: Thomas' algorithm, a loop down and a loop up."""

from __future__ import annotations

import torch
from torch import Tensor


def tridiag_reference(dl: Tensor, d: Tensor, du: Tensor, rhs: Tensor) -> Tensor:
    r"""Eliminate from the first row to the last, substitute back; autograd gives the gradients.

    After row i is eliminated it reads $s_i + \gamma_i s_{i+1} = \rho_i$. Shapes as in `tridiag`.
    """
    N = d.shape[-1]
    # unbind, not d[..., i]: the backward of each slice would fill a zero tensor of the whole length, O(N^2) in all
    below, main, above, right = dl.unbind(-1), d.unbind(-1), du.unbind(-1), rhs.unbind(-2)
    gamma, rho = [], []
    for i in range(N):
        pivot, value = main[i], right[i]
        if i > 0:
            pivot = pivot - below[i - 1] * gamma[-1]
            value = value - below[i - 1][..., None] * rho[-1]
        if i < N - 1:
            gamma.append(above[i] / pivot)
        rho.append(value / pivot[..., None])
    s = [rho[-1]]
    for i in range(N - 2, -1, -1):
        s.append(rho[i] - gamma[i][..., None] * s[-1])
    return torch.stack(s[::-1], dim=-2)

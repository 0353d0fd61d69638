"""The definition of the Vandermonde sum: one exponential after the other. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor


def vandermonde_reference(v: Tensor, w: Tensor, L: int) -> Tensor:
    """Add the terms one at a time; autograd gives the gradients. Shapes as in `vandermonde`.

    Always in double precision: w l may be many turns, and of 100,000 radians float32 keeps only two decimals.
    """
    l = torch.arange(L, dtype=torch.float64, device=v.device)
    K = torch.zeros(v.shape[0], L, dtype=torch.float64, device=v.device)
    for amplitude, exponent in zip(v.to(torch.complex128).unbind(1), w.to(torch.complex128).unbind(1), strict=True):
        K = K + 2 * (amplitude[:, None] * torch.exp(exponent[:, None] * l)).real
    return K.to(v.real.dtype)

"""The definition of the causal convolution: a loop over the taps. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor


def fftconv_reference(u: Tensor, k: Tensor) -> Tensor:
    """Add one delayed copy of the input per tap; autograd gives the gradients.

    u ``(..., L)`` and k ``(..., K)`` with K <= L are of one dtype, and their leading sizes broadcast.
    """
    L = u.shape[-1]
    y = torch.zeros(torch.broadcast_shapes(u.shape[:-1], k.shape[:-1]) + (L,), dtype=u.dtype, device=u.device)
    for delay, tap in enumerate(k.unbind(-1)):
        late = torch.nn.functional.pad(u[..., : L - delay], (delay, 0))
        y = y + tap[..., None] * late
    return y

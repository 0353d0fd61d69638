"""The definition of the 2 x 2 block scan: a loop over time. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype


def block2_step(J: Tensor, r: Tensor, h: Tensor) -> Tensor:
    r"""One step, $J h + r$ per channel: J ``(B, D, 2, 2)``, r and h ``(B, D, 2)`` -> ``(B, D, 2)``."""
    return (J * h[..., None, :]).sum(-1) + r


def block2_scan_reference(J: Tensor, r: Tensor, h0: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Walk along T one step at a time; autograd gives the gradients. Shapes as in `block2_scan`."""
    dtype = accumulate_dtype(r.dtype)
    # unbind, not J[:, t]: the backward of each slice would fill a zero tensor of the whole length, O(T^2) in all
    matrices, inputs = J.to(dtype).unbind(1), r.to(dtype).unbind(1)
    steps = range(r.shape[1] - 1, -1, -1) if reverse else range(r.shape[1])
    h, states = h0, []
    for t in steps:
        h = block2_step(matrices[t], inputs[t], h)
        states.append(h)
    if not states:
        return r.clone(), h0
    if reverse:
        states.reverse()
    return torch.stack(states, dim=1).to(r.dtype), h

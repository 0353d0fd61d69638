"""The definition of the linear scan: a loop over time. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype


def linear_scan_reference(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Walk along T one step at a time; autograd gives the gradients. Shapes as in `linear_scan`."""
    dtype = accumulate_dtype(b.dtype)
    # unbind, not a[:, t]: the backward of each slice would fill a zero tensor of the whole length, O(T^2) in all
    gates, inputs = a.to(dtype).unbind(1), b.to(dtype).unbind(1)
    steps = range(b.shape[1] - 1, -1, -1) if reverse else range(b.shape[1])
    h, states = h0, []
    for t in steps:
        h = gates[t] * h + inputs[t]
        states.append(h)
    if not states:
        return b.clone(), h0
    if reverse:
        states.reverse()
    return torch.stack(states, dim=1).to(b.dtype), h

"""The definition of the Cauchy sum: one pole after the other. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor


def cauchy_reference(v: Tensor, z_imag: Tensor, w: Tensor) -> Tensor:
    """Add the poles one at a time, in complex arithmetic; autograd gives the gradients. Shapes as in `cauchy`."""
    z = torch.complex(torch.zeros_like(z_imag), z_imag)  # (L,) or (R, L)
    y = v.new_zeros(v.shape[0], z.shape[-1])
    for residue, pole in zip(v.unbind(1), w.unbind(1), strict=True):
        residue, pole = residue[:, None], pole[:, None]
        y = y + residue / (z - pole) + residue.conj() / (z - pole.conj())
    return y

"""The definition of the Krylov matrix: one product with the matrix after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def krylov_reference(Abar: Tensor, Bbar: Tensor, L: int) -> Tensor:
    """Multiply L - 1 times; autograd gives the gradients. Shapes as in `krylov`."""
    if L == 0:
        return Bbar.new_empty(*Bbar.shape, 0)
    x, columns = Bbar[..., None], [Bbar]
    for _ in range(L - 1):
        x = Abar @ x
        columns.append(x.squeeze(-1))
    return torch.stack(columns, dim=-1)

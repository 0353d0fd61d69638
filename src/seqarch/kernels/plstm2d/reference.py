"""The definition of the recurrence on a grid: a loop over its cells. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor


def plstm2d_reference(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """Visit the cells row by row; autograd gives the gradients.

    q and k ``(N, X, Y, K)``, v ``(N, X, Y, V)``, gates ``(N or 1, X, Y, 9)`` in the order of `GATES`, all of one dtype.
    """
    N, X, Y, K = q.shape
    nothing = q.new_zeros(N, K, v.shape[-1])
    R = [nothing] * Y  # what leaves the cell visited last in column y, to the right
    D, outputs = nothing, []  # D: what leaves the cell visited last, downwards
    # unbind, not q[:, x, y]: the backward of each index would fill a zero tensor of the whole grid, O(X^2 Y^2) in all
    cells = zip(*(t.flatten(1, 2).unbind(1) for t in (q, k, v, gates)), strict=True)
    for index, (query, key, value, gate) in enumerate(cells):
        y = index % Y
        L, U = R[y], nothing if y == 0 else D
        TRL, TRU, SR, TDL, TDU, SD, ML, MU, own = gate[:, None, None].unbind(-1)
        source = key[:, :, None] * value[:, None, :]
        R[y] = TRL * L + TRU * U + SR * source
        D = TDL * L + TDU * U + SD * source
        outputs.append((query[:, None, :] @ (ML * L + MU * U + own * source))[:, 0])
    return torch.stack(outputs, dim=1).view(v.shape) if outputs else v.clone()

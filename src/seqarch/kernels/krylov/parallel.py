r"""The Krylov matrix by doubling: about $\log_2 L$ wide products instead of L - 1 narrow ones.

If X holds the first m columns and $P = \bar A^m$, then $P X$ holds the next m. So start with one column and P equal to
$\bar A$, append $P X$, square P, and repeat: the width doubles every time. The last product is cut to the columns still
missing.

Squaring doubles the relative error of P, so after all doublings P would be wrong by about L roundings, and where
$\bar A$ neither grows nor decays, so would be the last columns. The powers, which are few and small, are therefore
formed in double precision. Then every doubling adds one rounding of the result's own precision, $\log_2 L$ in all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def double(dtype: torch.dtype) -> torch.dtype:
    """Return the double-precision dtype, real or complex like `dtype`."""
    return torch.complex128 if dtype.is_complex else torch.float64


def krylov_blocks(A: Tensor, X: Tensor, count: int) -> Tensor:
    r"""Return $[X, A X, \dots, A^{count-1} X]$ side by side, for a block X ``(..., N, K)``: ``(..., N, count K)``."""
    wanted = count * X.shape[-1]
    power = A.to(double(A.dtype))
    while X.shape[-1] < wanted:
        X = torch.cat([X, power.to(X.dtype) @ X[..., : wanted - X.shape[-1]]], dim=-1)
        if X.shape[-1] < wanted:
            power = power @ power
    return X


def krylov_parallel(Abar: Tensor, Bbar: Tensor, L: int) -> Tensor:
    """Doubling; shapes as in `krylov`."""
    return krylov_blocks(Abar, Bbar[..., None], L)

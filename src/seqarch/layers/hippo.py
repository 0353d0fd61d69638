r"""HiPPO matrices: linear systems whose state is a compressed memory of their input (chapters 07, 08 and 09).

All follow the convention $x'(t) = A\,x(t) + B\,u(t)$, with indices from 0.

* ``"legs"``: $A_{nk} = -\sqrt{2n+1}\sqrt{2k+1}$ below the diagonal, $-(n+1)$ on it, 0 above; $B_n = \sqrt{2n+1}$.
* ``"legt"``: $A_{nk} = -\sqrt{2n+1}\sqrt{2k+1}$ for n >= k and $(-1)^{k-n}$ times that above; $B_n = \sqrt{2n+1}$. The
  window has length 1: divide A and B by $\theta$ for a window of length $\theta$.
* ``"lagt"``: $A = \tfrac12 I - L$ with L the lower triangle of ones; $B = 1$. Exponentially fading memory.
* ``"lmu"``: the system of ``"legt"`` in the coordinates of the Legendre Memory Unit: $A_{nk} = (2n+1)(-1)^{n-k+1}$ for
  n >= k and $-(2n+1)$ above; $B_n = (2n+1)(-1)^n$.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MEASURES", "hippo"]

MEASURES = ("legs", "legt", "lagt", "lmu")


def hippo(measure: str, N: int) -> tuple[Tensor, Tensor]:
    """Return the matrix A ``(N, N)`` and the vector B ``(N,)`` of a HiPPO system, in float64.

    Args:
        measure: which part of the past counts: ``"legs"``, ``"legt"``, ``"lagt"`` or ``"lmu"``.
        N: how many coefficients the memory holds.

    Raises:
        ValueError: an unknown measure, or N below 1.
    """
    if measure not in MEASURES:
        raise ValueError(f"expected measure to be one of {', '.join(MEASURES)}, got {measure!r}")
    if not isinstance(N, int) or N < 1:
        raise ValueError(f"expected N to be an integer of at least 1, got {N!r}")
    n = torch.arange(N, dtype=torch.float64)
    if measure == "lagt":
        return 0.5 * torch.eye(N, dtype=torch.float64) - torch.ones(N, N, dtype=torch.float64).tril(), torch.ones_like(
            n
        )
    parity = 1 - 2 * (n % 2)  # (-1)^n
    signs = parity[:, None] * parity
    if measure == "lmu":
        width = 2 * n + 1
        return -width[:, None] * (signs.tril() + torch.ones_like(signs).triu(1)), width * parity
    root = (2 * n + 1).sqrt()
    outer = root[:, None] * root
    if measure == "legs":
        return -(outer.tril(-1) + torch.diag(n + 1)), root
    return -outer * (torch.ones_like(signs).tril() + signs.triu(1)), root

r"""HiPPO matrices: linear systems whose state is a compressed memory of their input (chapters 07, 08 and 09).

All follow the convention $x'(t) = A\,x(t) + B\,u(t)$, with indices from 0.

* ``"legs"``: $A_{nk} = -\sqrt{2n+1}\sqrt{2k+1}$ below the diagonal, $-(n+1)$ on it, 0 above; $B_n = \sqrt{2n+1}$.
* ``"legt"``: $A_{nk} = -\sqrt{2n+1}\sqrt{2k+1}$ for n >= k and $(-1)^{k-n}$ times that above; $B_n = \sqrt{2n+1}$. The
  window has length 1: divide A and B by $\theta$ for a window of length $\theta$.
* ``"lagt"``: $A = \tfrac12 I - L$ with L the lower triangle of ones; $B = 1$. Exponentially fading memory.
* ``"lmu"``: the system of ``"legt"`` in the coordinates of the Legendre Memory Unit: $A_{nk} = (2n+1)(-1)^{n-k+1}$ for
  n >= k and $-(2n+1)$ above; $B_n = (2n+1)(-1)^n$.

The first three are *normal plus low rank*: `nplr` splits them into a matrix with orthonormal eigenvectors and one or two
rank-one corrections.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MEASURES", "hippo", "nplr"]

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


def nplr(measure: str, N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Split a HiPPO system into a normal matrix and r rank-one corrections, in the basis of the normal part.

    $$A = V\,\Big(\operatorname{diag}(\lambda) - \sum_{j=1}^{r} P_j P_j^*\Big)\,V^*,\qquad V^*V = I .$$

    Args:
        measure: ``"legs"`` or ``"lagt"`` (r = 1), or ``"legt"`` (r = 2).
        N: the size of the system.

    Returns:
        ``lam`` ``(N,)``, ``P`` ``(r, N)``, ``B`` ``(N,)`` and ``V`` ``(N, N)``, all in complex128. P and B are those of
        `hippo`'s basis, multiplied by $V^*$; a read-out C (a row) becomes C V. The eigenvalues have one common real part,
        -1/2 for LegS and 0 for the other two, and are sorted by their imaginary parts, so that in an even system the
        last N/2 are the ones of the upper half plane.

    Raises:
        ValueError: another measure, or N below 1.
    """
    low_rank = {"legs": 1, "legt": 2, "lagt": 1}
    if measure not in low_rank:
        raise ValueError(f"expected measure to be one of {', '.join(low_rank)}, got {measure!r}")
    A, B = hippo(measure, N)
    n = torch.arange(N, dtype=torch.float64)
    if measure == "legs":
        P = (n + 0.5).sqrt()[None]
    elif measure == "lagt":
        P = torch.full((1, N), 0.5**0.5, dtype=torch.float64)
    else:  # even and odd polynomials apart: the signs above the diagonal cancel, the diagonal vanishes
        P = (2 * n + 1).sqrt() * torch.stack([1 - n % 2, n % 2])
    normal = A + P.T @ P  # a multiple of the identity plus a skew-symmetric matrix
    real = normal.diagonal().mean()
    skew = normal - real * torch.eye(N, dtype=torch.float64)
    imag, V = torch.linalg.eigh(-1j * skew)  # Hermitian: real eigenvalues, orthonormal eigenvectors
    to_basis = V.mH
    return torch.complex(real.expand(N), imag), (to_basis @ P.T.to(V.dtype)).T.contiguous(), to_basis @ B.to(V.dtype), V

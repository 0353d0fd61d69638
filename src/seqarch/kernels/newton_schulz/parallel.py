r"""The Newton-Schulz iteration for many matrices at once, and with a gradient that keeps only one matrix per step.

Tall matrices are transposed first, since $X (X^\top X) = (X X^\top) X$: M is then square of the smaller side.
A step $X' = aX + NX$ with $N = bM + cM^2$ and $M = X X^\top$ is differentiated by hand. With $\bar x$ for the gradient of x,

$$\bar N = \bar X' X^\top,\qquad \bar M = b \bar N + c\,(\bar N M + M \bar N),\qquad
  \bar X = a \bar X' + N \bar X' + (\bar M + \bar M^\top) X$$

(M and N are symmetric). Only the X of every step is kept; M and N are formed again on the way back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._dispatch import accumulate_dtype
from .reference import COEFFICIENTS, norm


def _polynomial(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return M and N of the equations above, ``(P, m, m)``."""
    _, b, c = COEFFICIENTS
    M = torch.bmm(X, X.mT)
    return M, torch.baddbmm(M, M, M, beta=b, alpha=c)


class _Iterate(torch.autograd.Function):
    """All steps, on matrices ``(P, m, n)`` of norm at most 1, and their gradient."""

    @staticmethod
    def forward(ctx, X: Tensor, steps: int) -> Tensor:
        kept = []
        for _ in range(steps):
            kept.append(X)
            X = torch.baddbmm(X, _polynomial(X)[1], X, beta=COEFFICIENTS[0])
        ctx.save_for_backward(*kept)
        return X

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        a, b, c = COEFFICIENTS
        for X in reversed(ctx.saved_tensors):
            M, N = _polynomial(X)
            grad_N = torch.bmm(g, X.mT)
            # M is symmetric: the two products of a symmetrised gradient are transposes of each other
            both = grad_N + grad_N.mT
            product = torch.bmm(both, M)
            grad_M = b * both + c * (product + product.mT)
            g = torch.baddbmm(torch.baddbmm(g, N, g, beta=a), grad_M, X)
        return g, None


def newton_schulz_parallel(G: Tensor, steps: int, eps: float) -> Tensor:
    """All matrices of G ``(..., m, n)`` together; the norm in float32 (float64 where G is)."""
    wide = G.to(accumulate_dtype(G.dtype)).reshape(-1, *G.shape[-2:])
    X = wide / (norm(wide) + eps)
    tall = G.shape[-2] > G.shape[-1]
    X = _Iterate.apply(X.mT if tall else X, steps)
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)

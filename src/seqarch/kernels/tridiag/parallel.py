r"""The tridiagonal solve in blocks of M rows: Thomas' algorithm with small dense systems in place of numbers.

Neighbouring blocks touch in two numbers only: the one below the diagonal, b, and the one above it, a. Let the blocks
before block k be eliminated. Then block k with its changed first row, $D'_k$, leaves

$$s_k + \gamma_k\, s_{k+1,\text{first}} = \rho_k,\qquad D'_k\, [\rho_k,\; \gamma_k] = [r'_k,\; a_k e_{\text{last}}] ,$$

one dense solve with K + 1 right-hand sides. It changes the first row of the next block: its diagonal loses
$b_k \gamma_{k,\text{last}}$, its right-hand side $b_k \rho_{k,\text{last}}$. The way back is one product per block.

The loop has N/M iterations instead of N, and the work is O(N). Inside a block the library exchanges rows where that
is better, so this form is at least as accurate as the plain loop. Solving all blocks at once and joining them afterwards
would be a shorter loop still; but then every block must be regular by itself, and a skew-symmetric block of odd size,
such as chapter 07 has, is singular.

The gradient solves the transposed system with the same function (equations in `tridiag`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 32


def _dense(dl: Tensor, d: Tensor, du: Tensor) -> Tensor:
    """The tridiagonal matrix ``(..., M, M)``."""
    return torch.diag_embed(d) + torch.diag_embed(dl, offset=-1) + torch.diag_embed(du, offset=1)


def _solve(dl: Tensor, d: Tensor, du: Tensor, rhs: Tensor) -> Tensor:
    """Solve by blocks, without autograd."""
    N, K = rhs.shape[-2:]
    starts = range(0, N, BLOCK)
    gammas, rhos = [], []
    for start in starts:
        stop = min(start + BLOCK, N)
        inside = slice(start, stop - 1)  # the numbers beside the diagonal that belong to this block
        matrix = _dense(dl[..., inside], d[..., start:stop], du[..., inside])
        right = rhs.new_zeros(*rhs.shape[:-2], stop - start, K + 1)
        right[..., :K] = rhs[..., start:stop, :]
        if start > 0:
            b = dl[..., start - 1]
            matrix[..., 0, 0] -= b * gammas[-1][..., -1]
            right[..., 0, :K] -= b[..., None] * rhos[-1][..., -1, :]
        if stop < N:
            right[..., -1, K] = du[..., stop - 1]
        solution = torch.linalg.solve(matrix, right)
        rhos.append(solution[..., :K])
        gammas.append(solution[..., K])
    s = rhos[-1]
    parts = [s]
    for rho, gamma in zip(reversed(rhos[:-1]), reversed(gammas[:-1]), strict=True):
        s = rho - gamma[..., None] * s[..., :1, :]
        parts.append(s)
    return torch.cat(parts[::-1], dim=-2)


class _Tridiag(torch.autograd.Function):
    """The solve and its gradient, which is a solve with the transposed matrix (equations in `tridiag`)."""

    @staticmethod
    def forward(ctx, dl: Tensor, d: Tensor, du: Tensor, rhs: Tensor) -> Tensor:
        s = _solve(dl, d, du, rhs)
        ctx.save_for_backward(dl, d, du, s)
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, ...]:
        dl, d, du, s = ctx.saved_tensors
        lam = _solve(du.conj(), d.conj(), dl.conj(), g)
        s = s.conj()
        grad_dl = -(lam[..., 1:, :] * s[..., :-1, :]).sum(-1)
        grad_du = -(lam[..., :-1, :] * s[..., 1:, :]).sum(-1)
        return grad_dl, -(lam * s).sum(-1), grad_du, lam


def tridiag_parallel(dl: Tensor, d: Tensor, du: Tensor, rhs: Tensor) -> Tensor:
    """Block elimination with its hand-written gradient; shapes as in `tridiag`."""
    return _Tridiag.apply(dl, d, du, rhs)

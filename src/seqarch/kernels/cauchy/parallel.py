r"""The Cauchy sum in real arithmetic, many poles at a time, with a hand-written gradient.

Write $v = p + iq$ and $w = a + ib$. The two fractions of a conjugate pair have the common denominator

$$(i\zeta - w)(i\zeta - \bar w) = \left[a^2 + (b - \zeta)(b + \zeta)\right] - 2ia\zeta,
  \qquad\text{numerator}\quad -2(pa + qb) + 2ip\,\zeta .$$

The real part must be formed with the product $(b-\zeta)(b+\zeta)$ and not as $b^2 - \zeta^2$: next to a pole the
difference $b - \zeta$ of two close numbers is exact, the difference of their squares has lost its digits.

The numerator is linear in the two numbers $-2(pa+qb)$ and $2p$ of a pole. So with $X + iY$ for one over the
denominator, the sum over poles is a product of a ``(2, S)`` matrix with the ``(S, L)`` matrices X and Y. Blocks of rows,
poles and points keep X and Y small enough for the cache. The backward pass forms $1/(z-w)$ and $1/(z-\bar w)$ again (equations
in `cauchy`), so nothing of size R S L is ever stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2**16  # numbers in one table: a few tables of this size stay in a processor's cache
POINTS = 2048  # of a row in one table


def _blocks(R: int, S: int, L: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut rows, poles and points so that a table has about BLOCK numbers: whole rows if they are short, else parts."""
    points = -(-L // -(-L // POINTS))  # equal parts, not one short rest
    poles = min(S, BLOCK // points)
    rows = max(1, BLOCK // (poles * points))
    for r in range(0, R, rows):
        for s in range(0, S, poles):
            for l in range(0, L, points):
                yield slice(r, r + rows), slice(s, s + poles), slice(l, l + points)


def _forward(v: Tensor, zeta: Tensor, w: Tensor) -> Tensor:
    """Return y ``(R, L)``; zeta is ``(R, L)``."""
    weights = torch.stack([-2 * (v.real * w.real + v.imag * w.imag), 2 * v.real], dim=1)  # (R, 2, S)
    y = v.new_zeros(v.shape[0], zeta.shape[-1])
    for r, s, l in _blocks(*v.shape, zeta.shape[-1]):
        z, a, b = zeta[r, None, l], w.real[r, s, None], w.imag[r, s, None]
        real = torch.addcmul(a * a, b - z, b + z)
        imag = -2 * a * z
        norm = real.square().addcmul_(imag, imag).reciprocal_()
        X, Y = weights[r, :, s] @ real.mul_(norm), weights[r, :, s] @ imag.mul_(norm).neg_()
        y[r, l] += torch.complex(X[:, 0] - zeta[r, l] * Y[:, 1], Y[:, 0] + zeta[r, l] * X[:, 1])
    return y


class _Cauchy(torch.autograd.Function):
    """The sum and its gradient (equations in `cauchy`)."""

    @staticmethod
    def forward(ctx, v: Tensor, zeta: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(v, zeta, w)
        return _forward(v, zeta, w)

    @staticmethod
    @once_differentiable
    def backward(ctx, G: Tensor) -> tuple[Tensor | None, ...]:
        v, zeta, w = ctx.saved_tensors
        sums, squares = torch.zeros_like(v), torch.zeros_like(v)
        G = G[..., None]
        conj_G = G.conj().resolve_conj()
        for r, s, l in _blocks(*v.shape, zeta.shape[-1]):
            a, b, z = w.real[r, s, None], w.imag[r, s, None], zeta[r, None, l]
            below, above = z - b, z + b
            near, far = 1 / (a * a + below * below), 1 / (a * a + above * above)
            conj_inverse = torch.complex(-a * near, below * near)  # conj(1 / (z - w))
            inverse = torch.complex(-a * far, -above * far)  # 1 / (z - conj(w))
            sums[r, s] += (conj_inverse @ G[r, l] + inverse @ conj_G[r, l]).squeeze(-1)
            squares[r, s] += (conj_inverse.square() @ G[r, l] + inverse.square() @ conj_G[r, l]).squeeze(-1)
        return sums, None, v.conj() * squares


def cauchy_parallel(v: Tensor, z_imag: Tensor, w: Tensor) -> Tensor:
    """Blocked sum with its hand-written gradient; shapes as in `cauchy`."""
    return _Cauchy.apply(v, z_imag.expand(v.shape[0], -1), w)

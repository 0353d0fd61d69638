r"""Newton-Schulz: push all singular values of a matrix towards 1 without computing them (chapter 18).

With $X_0 = G / (\lVert G \rVert_F + \varepsilon)$ and $M = X X^\top$, repeat

$$X \leftarrow a X + (b M + c M^2)\, X,\qquad (a, b, c) = (3.4445,\ -4.7750,\ 2.0315).$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (the same with a thrifty gradient).
"""

from __future__ import annotations

from torch import Tensor

from .._dispatch import check_same, check_values, choose
from .parallel import newton_schulz_parallel
from .reference import COEFFICIENTS, newton_schulz_reference

__all__ = ["COEFFICIENTS", "newton_schulz"]


def newton_schulz(G: Tensor, steps: int = 5, *, eps: float = 1e-7, backend: str = "auto") -> Tensor:
    r"""Return a matrix with the singular vectors of G and singular values near 1: almost $U V^\top$.

    A step maps every singular value $\sigma$ to $a\sigma + b\sigma^3 + c\sigma^5$ and leaves the singular vectors as they
    are. The polynomial rises steeply from 0 and then wanders around 1: after five steps a value that was at least 1/200
    of the norm lies between 0.65 and 1.2, but does not settle at 1; a much smaller one has grown by a factor of up to
    3.4445 a step, and lags behind.

    Args:
        G: matrices, ``(..., m, n)``; each is taken by itself.
        steps: how often the polynomial is applied; 0 only divides by the norm.
        eps: added to the norm, so that a matrix of zeros stays zero, with a finite gradient.
        backend: ``"auto"``, ``"reference"`` or ``"parallel"``. There is no Triton kernel: the work is three matrix
            products a step, which the library routines already do at full speed.

    Returns:
        X of G's shape and dtype. Half precision is widened to float32 inside: rounding X after every step would be
        amplified with the smallest singular values.

    Gradients flow to G, through every step. Since the length of G does not matter, they are orthogonal to it. For a
    matrix with one entry nothing is left: the gradient is zero but for eps and rounding.

    Raises:
        ValueError: wrong shape, dtype, steps or backend, with what was expected and what was given.
    """
    if not isinstance(G, Tensor) or G.ndim < 2:
        got = tuple(G.shape) if isinstance(G, Tensor) else type(G).__name__
        raise ValueError(f"expected G to be a tensor of shape (..., m, n), got {got}")
    check_same(("G", G))
    if not G.is_floating_point():
        raise ValueError(f"expected G of a floating-point dtype, got {G.dtype}")
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"expected steps to be an integer of at least 0, got {steps!r}")
    if not eps > 0:
        raise ValueError(f"expected eps to be positive, got {eps}")
    check_values(G=G)
    why = "newton_schulz has no Triton kernel, as matrix products of the library are as fast as it gets"
    chosen = choose(backend, G, limit=why)
    if G.numel() == 0:
        return G.clone()
    return (newton_schulz_reference if chosen == "reference" else newton_schulz_parallel)(G, steps, eps)

r"""Tridiagonal systems of equations: the structured transition matrices of chapter 07 in O(N).

$$T s = r,\qquad T_{i,i-1} = dl_{i-1},\quad T_{i,i} = d_i,\quad T_{i,i+1} = du_i .$$

Read the folder in this order: ``reference.py`` (the definition, Thomas' algorithm), ``parallel.py`` (blocks). There is no
Triton kernel: the blocks are solved by the library.
"""

from __future__ import annotations

from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_values, choose
from .parallel import tridiag_parallel
from .reference import tridiag_reference

__all__ = ["tridiag"]

WHY_NO_TRITON = "there is no Triton kernel for tridiag, the dense solver of the library is the fast path"


def tridiag(dl: Tensor, d: Tensor, du: Tensor, rhs: Tensor, *, backend: str = "auto") -> Tensor:
    r"""Solve $T s = r$ for K right-hand sides, in every batch element.

    Args:
        dl: the diagonal below, ``(..., N-1)``.
        d: the main diagonal, ``(..., N)``.
        du: the diagonal above, ``(..., N-1)``.
        rhs: right-hand sides, ``(..., N, K)``. All four share one dtype and their leading sizes.
        backend: ``"auto"``, ``"reference"`` or ``"parallel"``.

    Returns:
        ``s`` ``(..., N, K)``, of rhs's dtype. Half precision is computed in float32.

    Zeros on the diagonal are allowed, as long as elimination without row exchanges meets no zero pivot: the leading
    square blocks of T must be regular. (Diagonal dominance is enough, and so is the skew-symmetric T of chapter 07.)

    Gradients flow to all inputs. With g the gradient of s, one transposed system gives all of them:
    $$T^{\mathsf H} \lambda = g,\quad \partial r = \lambda,\quad \partial d_i = -\sum_K \lambda_i \bar s_i,\quad
      \partial dl_i = -\sum_K \lambda_{i+1} \bar s_i,\quad \partial du_i = -\sum_K \lambda_i \bar s_{i+1} .$$
    Inputs of any stride are accepted.

    Raises:
        ValueError: wrong shape, dtype, device or backend, with what was expected and what was given.
    """
    _check(dl, d, du, rhs)
    chosen = choose(backend, rhs, limit=WHY_NO_TRITON)
    solve = tridiag_reference if chosen == "reference" or rhs.numel() == 0 else tridiag_parallel
    dtype = accumulate_dtype(rhs.dtype)
    return solve(*(x.to(dtype) for x in (dl, d, du, rhs))).to(rhs.dtype)


def _check(dl: Tensor, d: Tensor, du: Tensor, rhs: Tensor) -> None:
    named = {"dl": dl, "d": d, "du": du, "rhs": rhs}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"expected {name} to be a tensor, got {type(tensor).__name__}")
    if d.ndim == 0 or d.shape[-1] == 0:
        raise ValueError(f"expected d of shape (..., N) with N of at least 1, got {tuple(d.shape)}")
    off = (*d.shape[:-1], d.shape[-1] - 1)
    for name in ("dl", "du"):
        if tuple(named[name].shape) != off:
            raise ValueError(f"expected {name} of shape (..., N-1) = {off}, got {tuple(named[name].shape)}")
    if rhs.ndim != d.ndim + 1 or rhs.shape[:-1] != d.shape:
        sizes = ", ".join(map(str, d.shape))
        raise ValueError(f"expected rhs of shape (..., N, K) = ({sizes}, K), got {tuple(rhs.shape)}")
    check_same(("rhs", rhs), ("dl", dl), ("d", d), ("du", du))
    check_values(**named)

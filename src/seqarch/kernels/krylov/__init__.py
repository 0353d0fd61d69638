r"""The Krylov matrix of a linear system: its state after an impulse, at every step (chapters 07 and 08).

$$X = \left(\bar B,\; \bar A \bar B,\; \bar A^2 \bar B,\; \dots,\; \bar A^{L-1} \bar B\right) .$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (doubling). There is no Triton kernel:
the doubling is all matrix products, and those belong to the library.
"""

from __future__ import annotations

from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .parallel import krylov_parallel
from .reference import krylov_reference

__all__ = ["krylov"]

WHY_NO_TRITON = "there is no Triton kernel for krylov, the matrix products of the library are the fast path"


def krylov(Abar: Tensor, Bbar: Tensor, L: int, *, backend: str = "auto") -> Tensor:
    r"""Apply the powers 0 to L - 1 of a matrix to a vector, for every feature.

    Args:
        Abar: matrices, ``(H, N, N)``, real or complex.
        Bbar: vectors, ``(H, N)``, of Abar's dtype.
        L: how many powers.
        backend: ``"auto"``, ``"reference"`` or ``"parallel"``.

    Returns:
        ``X`` ``(H, N, L)`` of Bbar's dtype, with column l equal to $\bar A^l \bar B$. ``C @ X`` is the convolution
        kernel of the system that is read out by C. Half precision is computed in float32.

    Gradients flow to Abar and Bbar. Inputs of any stride are accepted.

    Raises:
        ValueError: wrong shape, dtype, device, length or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("Bbar", Bbar, "H N", sizes)
    check_shape("Abar", Abar, "H N N", sizes)
    check_same(("Bbar", Bbar), ("Abar", Abar))
    if not isinstance(L, int) or L < 0:
        raise ValueError(f"expected L to be an integer of at least 0, got {L!r}")
    check_values(Abar=Abar, Bbar=Bbar)
    chosen = choose(backend, Bbar, limit=WHY_NO_TRITON)
    apply = krylov_reference if chosen == "reference" or L == 0 else krylov_parallel
    dtype = accumulate_dtype(Bbar.dtype)
    return apply(Abar.to(dtype), Bbar.to(dtype), L).to(Bbar.dtype)

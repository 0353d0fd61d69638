r"""The Vandermonde sum with conjugate pairs: the convolution kernel of a diagonal system (chapter 08).

$$K_l = 2\,\mathrm{Re} \sum_{n=1}^{S} v_n\, e^{w_n l},\qquad l = 0,\dots,L-1 .$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (two tables of powers), ``triton.py``
(GPU).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._dispatch import check_same, check_shape, check_values, choose
from .parallel import vandermonde_parallel
from .reference import vandermonde_reference

__all__ = ["vandermonde"]

TRITON_DTYPES = (torch.complex64,)


def vandermonde(v: Tensor, w: Tensor, L: int, *, backend: str = "auto") -> Tensor:
    r"""Sample a sum of damped oscillations at the first L integers, for every row.

    Args:
        v: amplitudes, ``(R, S)``, complex.
        w: exponents, ``(R, S)``, of v's dtype, one of each conjugate pair: Re w is the (negative) growth per step, Im w
            the angle per step.
        L: how many samples.
        backend: ``"auto"``, ``"reference"``, ``"parallel"`` or ``"triton"``.

    Returns:
        ``K`` ``(R, L)``, real, of v's precision.

    Gradients flow to v and w. With $g_l = \partial \mathcal L / \partial K_l$,
    $$\partial v_n = 2\sum_l g_l\, \overline{e^{w_n l}},\qquad
      \partial w_n = 2\,\bar v_n \sum_l l\, g_l\, \overline{e^{w_n l}} .$$
    Angles of many turns are exact: $e^{w l}$ is a product of two factors, each taken from a table computed in double
    precision. Nothing of size R S L is stored, in either pass. Inputs of any stride are accepted; a contiguous copy is
    made where the kernel needs one.

    Raises:
        ValueError: wrong shape, dtype, device, length or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("v", v, "R S", sizes)
    check_shape("w", w, "R S", sizes)
    if v.dtype not in (torch.complex64, torch.complex128):
        raise ValueError(f"expected v of dtype torch.complex64 or torch.complex128, got {v.dtype}")
    check_same(("v", v), ("w", w))
    if not isinstance(L, int) or L < 0:
        raise ValueError(f"expected L to be an integer of at least 0, got {L!r}")
    check_values(v=v, w=w)

    chosen = choose(backend, v, w, dtypes=TRITON_DTYPES, turing=_triton_agrees)
    if v.numel() == 0 or L == 0 or chosen == "reference":
        return vandermonde_reference(v, w, L)
    if chosen == "parallel":
        return vandermonde_parallel(v, w, L)
    from .triton import vandermonde_triton

    return vandermonde_triton(v, w, L)


@functools.cache
def _triton_agrees() -> bool:
    """Run the Triton kernel once against the parallel form: the admission test for GPUs older than Triton promises."""
    v, w = torch.randn(2, 3, 20, dtype=torch.complex64, device="cuda").unbind()
    w = torch.complex(-w.real.abs() / 100, w.imag)
    try:
        K = vandermonde(v, w, 700, backend="triton")
        return torch.allclose(K, vandermonde(v, w, 700, backend="parallel"), rtol=1e-4, atol=1e-4)
    except Exception:  # a compiler error on an unsupported chip is an answer too
        return False

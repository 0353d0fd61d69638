r"""A dense linear time-invariant system for every feature, run as a recurrence (chapter 07).

$$x_k = \bar A\, x_{k-1} + \bar B\, u_k,\qquad y_k = C\, x_k + D\, u_k,\qquad k = 1,\dots,L .$$

Read the folder in this order: ``reference.py`` (the definition), ``parallel.py`` (chunks). There is no Triton kernel:
the chunked form is all matrix products, and those belong to the library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype, check_same, check_shape, check_values, choose
from .parallel import lti_scan_parallel
from .reference import advance, lti_scan_reference

__all__ = ["lti_scan", "lti_scan_step"]

WHY_NO_TRITON = "there is no Triton kernel for lti_scan, the matrix products of the library are the fast path"


def lti_scan(
    Abar: Tensor, Bbar: Tensor, C: Tensor, D: Tensor, u: Tensor, x0: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Run H systems, each with one input, N states and M outputs, over the time axis.

    Args:
        Abar: transitions, ``(H, N, N)``.
        Bbar: input vectors, ``(H, N)``.
        C: read-outs, ``(H, M, N)``.
        D: weights of the input itself, ``(H, M)``.
        u: inputs, ``(B, H, L)``; all tensors but x0 share its dtype.
        x0: the state before the first step, ``(B, H, N)``; None is zero.
        backend: ``"auto"``, ``"reference"`` or ``"parallel"``.

    Returns:
        ``y`` ``(B, M, H, L)`` of u's dtype, and the state after the last step ``xL`` ``(B, H, N)``, in float32 where
        the inputs are float16 or bfloat16. Feeding xL as the x0 of the next piece continues exactly where it stopped.

    Gradients flow to all inputs, from y and from xL. With $g_k = \partial \mathcal L/\partial y_k$,
    $$\lambda_k = C^\top g_k + \bar A^\top \lambda_{k+1},\quad \partial u_k = \bar B^\top \lambda_k + D^\top g_k,\quad
      \partial \bar A = \sum_k \lambda_k x_{k-1}^\top,\quad \partial \bar B = \sum_k \lambda_k u_k,\quad
      \partial C = \sum_k g_k x_k^\top .$$
    Inputs of any stride are accepted.

    Raises:
        ValueError: wrong shape, dtype, device or backend, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("u", u, "B H L", sizes)
    x0 = _check(Abar, Bbar, C, D, u, x0, "x0", sizes)
    chosen = choose(backend, u, limit=WHY_NO_TRITON)
    scan = lti_scan_reference if chosen == "reference" or u.numel() == 0 else lti_scan_parallel
    y, xL = scan(*(t.to(x0.dtype) for t in (Abar, Bbar, C, D, u)), x0)
    return y.to(u.dtype), xL


def lti_scan_step(
    Abar: Tensor, Bbar: Tensor, C: Tensor, D: Tensor, u: Tensor, x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step for streaming: u ``(B, H)`` and the state x ``(B, H, N)``; return y ``(B, M, H)`` and the new state.

    Raises:
        ValueError: wrong shape, dtype or device, with what was expected and what was given.
    """
    sizes: dict[str, int] = {}
    check_shape("u", u, "B H", sizes)
    x = _check(Abar, Bbar, C, D, u, x, "x", sizes)
    y, x = advance(*(t.to(x.dtype) for t in (Abar, Bbar, C, D, u)), x)
    return y.to(u.dtype), x


def _check(
    Abar: Tensor, Bbar: Tensor, C: Tensor, D: Tensor, u: Tensor, x: Tensor | None, name: str, sizes: dict[str, int]
) -> Tensor:
    """Check what both functions take beyond the shape of u; return the state to start from."""
    check_shape("Bbar", Bbar, "H N", sizes)
    check_shape("Abar", Abar, "H N N", sizes)
    check_shape("C", C, "H M N", sizes)
    check_shape("D", D, "H M", sizes)
    if not u.is_floating_point():
        raise ValueError(f"expected u of a real floating-point dtype, got {u.dtype}")
    check_same(("u", u), ("Abar", Abar), ("Bbar", Bbar), ("C", C), ("D", D))
    dtype = accumulate_dtype(u.dtype)
    if x is None:
        x = torch.zeros(sizes["B"], sizes["H"], sizes["N"], dtype=dtype, device=u.device)
    else:
        check_shape(name, x, "B H N", sizes)
        check_same(("u", u), (name, x), dtype=False)
    check_values(Abar=Abar, Bbar=Bbar, C=C, D=D, u=u, **{name: x})
    return x.to(dtype)
